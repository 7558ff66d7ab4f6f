"""The study: notebooks of a profile, run headless, what each leaves behind, and the report."""
