/* What the compiled parts of the package share. IS_DOUBLE says in which precision `real` numbers are. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
#endif

/* torch's int64 numbers come as arrays of long */
_Static_assert(sizeof(long) == sizeof(int64_t), "long has not the 64 bits that the compiled code needs");

#if IS_DOUBLE
typedef double real;
typedef unsigned long long bits;
#define MANTISSA 52
#define DEGREE 13
#define LOWEST -700.0
#define SQRT sqrt
#else
typedef float real;
typedef unsigned int bits;
#define MANTISSA 23
#define DEGREE 7
#define LOWEST -87.0f
#define SQRT sqrtf
#endif

/* What one instruction works on: vectors that a processor has no registers for go through memory, ten times slower. */
#ifdef __AVX__
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#define VECTOR (VECTOR_BYTES / sizeof(real))
typedef real vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real))));

/* exp(x) for x <= 0 as 2^k exp(r), |r| <= ln(2)/2: k in the low bits of a large sum, exp(r) by its Taylor series.
NaN stays NaN. */
static inline real exponential(real x) {
    const real large = (real)1.5 * (real)((bits)1 << MANTISSA);
    x = x < LOWEST ? LOWEST : x;
    real shifted = x * (real)M_LOG2E + large, k = shifted - large;
#if IS_DOUBLE
    real r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10, p = 1;
#else
    real r = (x - k * 0.693359375f) + k * 2.12194440e-4f, p = 1;
#endif
    for (int i = DEGREE; i > 0; i--) p = 1 + p * r * (real)(1.0 / i);
    bits power;
    real scale, one = 1;
    bits unit;
    memcpy(&power, &shifted, sizeof power);
    memcpy(&unit, &one, sizeof unit);
    power = (power << MANTISSA) + unit;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}
