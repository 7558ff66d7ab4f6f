/* Values and derivatives of SOAP and values of the symmetry functions, in one pass over each centre's neighbours.

The formulas are those of soap.py, radial.py and symmetry_functions.py, where the same is written with torch operations.
Every row of a result is written by one thread, so the numbers do not depend on the number of threads. Arrays are
row-major. A row of n_max radial functions is filled up with zeros to W, a multiple of four.

Spherical harmonics. With (x + i y)^m = A_m + i B_m and Q_lm(z) = d^m P_l / dz^m, the products A_m Q_lm and B_m Q_lm
are the real harmonics of a unit vector up to a norm, N_lm^2 = (2 l + 1) / 4 pi (l - m)! / (l + m)!, twice that for
m > 0. The recurrence of the Legendre polynomials, differentiated m times, gives

  Q_mm = (2 m - 1)!!,   (l - m) Q_lm = (2 l - 1) z Q_l-1,m - (l + m - 1) Q_l-2,m,   dQ_lm/dz = Q_l,m+1.

So the sums over neighbours go over c = f_nl(d) A_m Q_lm, and the norm comes in where two of them meet. With the factor
of the power spectrum it is

  p = sum_m u_lm c c,   u_lm = pi sqrt(8 / (2 l + 1)) N_lm^2 = sqrt((2 l + 1) / 2) (1 or 2 (l - m)! / (l + m)!). */

/* Precisions: float64 */

#include "compiled.h"

#define LANES 8 /* neighbours that are worked on side by side */

/* (1 + cos(pi t)) / 2 = sin^2(pi (1 - t) / 2) for 0 <= t <= 1, the sine by its Taylor series. */
static inline double cutoff(double t) {
    const double y = M_PI / 2 * (1 - t), square = y * y;
    double p = 1;
    for (int i = 11; i > 0; i--) p = 1 - p * square * (1.0 / (2 * i * (2 * i + 1)));
    return y * p * (y * p);
}

/* Pairs of the centres before one of them; `centre` (n_pairs,) holds every pair's, ascending. */
static long pairs_before(const long *centre, long n_pairs, long which) {
    long low = 0, high = n_pairs;
    while (low < high) {
        const long middle = (low + high) / 2;
        if (centre[middle] < which)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

typedef struct {
    long n_species, l_max, n_max, n_terms; /* n_terms: of the Chebyshev series; 0 for Gaussian-type orbitals */
    long n_pairs;
    double r_cut, reach;                   /* r_cut: of the cosine cutoff; 0 for none */
    const double *radial;                  /* (l, W) the decays c_nl, or (n_terms, l, W) the series */
    const double *slopes;                  /* (n_terms - 1, l, W) the series of the derivatives */
    const double *mixing;                  /* (l, n_max, W), transposed */
    const double *own;                     /* (n_max,) overlaps of the centre's own Gaussian */
    const long *centre, *neighbour_species, *species;
    const double *vectors;                 /* (n_pairs, 3) */
} Soap;

static long padded(long n) { return (n + 3) / 4 * 4; }

/* Harmonics of LANES unit vectors: A and B (l_max + 1), Q (l_max + 1, l_max + 2), where Q_l,l+1 = 0. */
typedef struct {
    double x[LANES], y[LANES], z[LANES], d[LANES];
    double (*A)[LANES], (*B)[LANES], (*Q)[LANES];
} Block;

static long block_room(long l_max) { return LANES * (l_max + 1) * (l_max + 4); }

static void place(Block *b, long l_max, double *room) {
    b->A = (double(*)[LANES])room, b->B = b->A + l_max + 1, b->Q = b->B + l_max + 1;
}

/* Fill a block with `count` pairs; unused lanes get the unit vector along z. */
static void fill(Block *b, long l_max, const double *vectors, const long *pairs, long first, long count) {
    for (long i = 0; i < LANES; i++) {
        const long pair = i >= count ? 0 : pairs ? pairs[first + i] : first + i;
        const double along[3] = {0, 0, 1}, *v = i < count ? vectors + 3 * pair : along;
        b->x[i] = v[0], b->y[i] = v[1], b->z[i] = v[2];
    }
#pragma omp simd
    for (long i = 0; i < LANES; i++) {
        const double d = sqrt(b->x[i] * b->x[i] + b->y[i] * b->y[i] + b->z[i] * b->z[i]);
        b->d[i] = d, b->x[i] /= d, b->y[i] /= d, b->z[i] /= d;
    }
    const long step = l_max + 2;
    for (long m = 0; m <= l_max; m++) {
        double *A = b->A[m], *B = b->B[m], *Q = b->Q[m * step + m];
#pragma omp simd
        for (long i = 0; i < LANES; i++) {
            A[i] = m ? b->x[i] * A[i - LANES] - b->y[i] * B[i - LANES] : 1;
            B[i] = m ? b->x[i] * B[i - LANES] + b->y[i] * A[i - LANES] : 0;
            Q[i] = m ? Q[i - (step + 1) * LANES] * (2 * m - 1) : 1;
            Q[i + LANES] = 0;
        }
        for (long l = m + 1; l <= l_max; l++) {
            double *new = b->Q[l * step + m];
            const double *one = new - step * LANES, *two = l > m + 1 ? one - step * LANES : one;
            const double over = 1.0 / (l - m), factor = (2 * l - 1) * over, back = l > m + 1 ? (l + m - 1) * over : 0;
#pragma omp simd
            for (long i = 0; i < LANES; i++) new[i] = factor * b->z[i] * one[i] - back * two[i];
        }
    }
}

/* f_nl(d) (l, W) before mixing, and its slope unless that is null. */
static void radial_functions(const Soap *s, double d, double *f, double *slope) {
    const long L = s->l_max + 1, W = padded(s->n_max);
    if (s->n_terms == 0) {
        /* d^l exp(-c d^2) */
#pragma omp simd
        for (long k = 0; k < L * W; k++) f[k] = exponential(-s->radial[k] * d * d);
        double power = 1;
        for (long l = 0; l < L; l++, power *= d)
            for (long k = l * W; k < (l + 1) * W; k++) {
                f[k] *= power;
                if (slope) slope[k] = (l / d - 2 * d * s->radial[k]) * f[k];
            }
    } else {
        memset(f, 0, L * W * sizeof(double));
        if (slope) memset(slope, 0, L * W * sizeof(double));
        const double x = d * (2 / s->reach) - 1;
        double term = 1, next = x;
        for (long t = 0; t < s->n_terms; t++) {
            const double *series = s->radial + t * L * W, *derived = s->slopes + t * L * W;
#pragma omp simd
            for (long k = 0; k < L * W; k++) f[k] += term * series[k];
            if (slope && t < s->n_terms - 1)
#pragma omp simd
                for (long k = 0; k < L * W; k++) slope[k] += term * derived[k];
            const double after = 2 * x * next - term;
            term = next, next = after;
        }
    }
    if (s->r_cut > 0) {
        const double weight = d < s->r_cut ? cutoff(d / s->r_cut) : 0;
        const double fall = d < s->r_cut ? -M_PI / 2 / s->r_cut * sin(M_PI / s->r_cut * d) : 0;
        for (long k = 0; k < L * W; k++) {
            if (slope) slope[k] = slope[k] * weight + f[k] * fall;
            f[k] *= weight;
        }
    }
}

/* to[n'] = sum_n mixing[l][n'][n] from[n] for every l; neither overlaps. */
static void mix(const Soap *s, long l, const double *from, double *to) {
    const long W = padded(s->n_max);
    const double *mixing = s->mixing + l * s->n_max * W;
    for (long v = 0; v < W; v += VECTOR) {
        vector sum = {0};
        for (long n = 0; n < s->n_max; n++) sum += from[n] * *(const vector *)(mixing + n * W + v);
        *(vector *)(to + v) = sum;
    }
}

/* Doubles of room that one thread needs: c, what moves it, and what functions need besides. */
long soap_room(const Soap *s) {
    const long L = s->l_max + 1, W = padded(s->n_max), Q = s->n_species * W;
    return L * L * Q + 3 * L * s->n_max * Q + block_room(s->l_max) + 2 * (L + 1) * W + 8 * L + 6 * Q;
}

/* c (order, species, W), orders l^2 (m = 0), l^2 + 2 m - 1 (A_m), l^2 + 2 m (B_m): the mean over some centres, times
u_lm or its square root. Room for (L + 1) W doubles and a block. */
static void coefficients(const Soap *s, long first, long last, int root, double *c, double *room) {
    const long L = s->l_max + 1, W = padded(s->n_max), step = s->n_species * W;
    double *f = room, *mixed = f + L * W;
    Block b;
    place(&b, s->l_max, mixed + W);
    memset(c, 0, L * L * step * sizeof(double));
    for (long centre = first; centre < last; centre++) {
        for (long n = 0; n < s->n_max; n++) c[s->species[centre] * W + n] += s->own[n];
        const long end = pairs_before(s->centre, s->n_pairs, centre + 1);
        for (long begin = pairs_before(s->centre, s->n_pairs, centre); begin < end; begin += LANES) {
            const long count = end - begin < LANES ? end - begin : LANES;
            fill(&b, s->l_max, s->vectors, 0, begin, count);
            for (long i = 0; i < count; i++) {
                radial_functions(s, b.d[i], f, 0);
                double *to = c + s->neighbour_species[begin + i] * W;
                for (long l = 0; l < L; l++)
                    for (long k = 0; k <= 2 * l; k++, to += step) {
                        const long m = (k + 1) / 2;
                        const double y = b.Q[l * (L + 1) + m][i] * (k == 2 * m && m ? b.B : b.A)[m][i];
                        for (long v = 0; v < W; v += VECTOR)
                            *(vector *)(to + v) += y * *(const vector *)(f + l * W + v);
                    }
            }
        }
    }
    for (long l = 0; l < L; l++) {
        double u = sqrt((2 * l + 1) / 2.0);
        for (long k = 0; k <= 2 * l; k++) {
            const long m = (k + 1) / 2;
            if (k % 2) u *= (m == 1 ? 2.0 : 1.0) / ((l - m + 1) * (l + m));
            const double factor = (root ? sqrt(u) : u) / (last - first);
            for (long q = 0; q < step; q += W) {
                double *from = c + (l * l + k) * step + q;
                mix(s, l, from, mixed);
                for (long n = 0; n < W; n++) from[n] = factor * mixed[n];
            }
        }
    }
}

/* Power spectra; row r is that of the mean coefficients of the centres rows[r] ... rows[r + 1], or, where `rows` is
null, of centre r. */
void soap_values(const Soap *s, long n_rows, const long *rows, long n_features, double *room, double *out,
                 int threads) {
    const long L = s->l_max + 1, W = padded(s->n_max), step = s->n_species * W, size = soap_room(s);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long r = 0; r < n_rows; r++) {
        double *c = room + omp_get_thread_num() * size, *p = out + r * n_features;
        coefficients(s, rows ? rows[r] : r, rows ? rows[r + 1] : r + 1, 1, c, c + L * L * step);
        for (long s1 = 0; s1 < s->n_species; s1++)
            for (long s2 = s1; s2 < s->n_species; s2++)
                for (long l = 0; l < L; l++) {
                    const double *left = c + l * l * step + s1 * W, *right = c + l * l * step + s2 * W;
                    for (long n1 = 0; n1 < s->n_max; n1++) {
                        double sums[W];
                        const long n2 = s1 == s2 ? n1 : 0;
                        for (long v = n2 / VECTOR * VECTOR; v < W; v += VECTOR) {
                            vector sum = {0};
                            for (long k = 0; k <= 2 * l; k++)
                                sum += left[k * step + n1] * *(const vector *)(right + k * step + v);
                            *(vector *)(sums + v) = sum;
                        }
                        memcpy(p, sums + n2, (s->n_max - n2) * sizeof(double));
                        p += s->n_max - n2;
                    }
                }
    }
}

/* moved[l][n][q][x] += sum_m u_lm c_q dc_n/dx, where the neighbour at lane i of a block moves and c of its own element
changes. A move along the bond changes the radial factor, one across it the harmonics, whose polynomials have the slopes
dA_m/dx = m A_m-1 = dB_m/dy and dB_m/dx = m B_m-1 = -dA_m/dy. c holds u_lm c. Room for 2 (L + 1) W + 8 L +
6 n_species W doubles. */
static void move(const Soap *s, const Block *b, long i, const double *c, double *moved, double *room) {
    const long L = s->l_max + 1, W = padded(s->n_max), step = s->n_species * W;
    double *f = room, *slope = f + L * W, *along = slope + L * W, *across = along + W;
    double(*harmonics)[4] = (double(*)[4])(across + W);
    double *outward = (double *)(harmonics + 2 * L), *around = outward + 3 * step;
    const double u[3] = {b->x[i], b->y[i], b->z[i]}, over = 1 / b->d[i];
    radial_functions(s, b->d[i], f, slope);
    for (long k = 0; k < L * W; k++) f[k] *= over;
    for (long l = 0; l < L; l++, c += (2 * l - 1) * step) {
        for (long k = 0; k <= 2 * l; k++) {
            const long m = (k + 1) / 2, is_b = k && k % 2 == 0;
            const double own = (is_b ? b->B : b->A)[m][i], *Q = &b->Q[l * (L + 1) + m][i];
            const double A = m ? m * b->A[m - 1][i] : 0, B = m ? m * b->B[m - 1][i] : 0;
            double *h = harmonics[k];
            h[0] = own * Q[0], h[1] = (is_b ? B : A) * Q[0], h[2] = (is_b ? A : -B) * Q[0], h[3] = own * Q[LANES];
        }
        for (long q = 0; q < step; q += VECTOR) {
            vector sum[4] = {{0}};
            for (long k = 0; k <= 2 * l; k++) {
                const vector weight = *(const vector *)(c + k * step + q);
                for (int x = 0; x < 4; x++) sum[x] += harmonics[k][x] * weight;
            }
            const vector radial = u[0] * sum[1] + u[1] * sum[2] + u[2] * sum[3];
            for (int x = 0; x < 3; x++) {
                const vector out = u[x] * sum[0], turn = sum[x + 1] - u[x] * radial;
                for (unsigned j = 0; j < VECTOR; j++)
                    outward[3 * (q + j) + x] = out[j], around[3 * (q + j) + x] = turn[j];
            }
        }
        mix(s, l, slope + l * W, along);
        mix(s, l, f + l * W, across);
        for (long n = 0; n < s->n_max; n++, moved += 3 * step)
            for (long q = 0; q < 3 * step; q += VECTOR)
                *(vector *)(moved + q) += along[n] * *(vector *)(outward + q) + across[n] * *(vector *)(around + q);
    }
}

/* dp (n_features, 3) of an atom of element s0 from what `move` gave: dp = c dc + dc c, where dc has s0 only. */
static void feature_slopes(const Soap *s, long s0, const double *moved, double *out) {
    const long L = s->l_max + 1, N = s->n_max, W = padded(N), row = 3 * s->n_species * W;
    for (long s1 = 0; s1 < s->n_species; s1++)
        for (long s2 = s1; s2 < s->n_species; s2++) {
            const long same = s1 == s2, size = 3 * L * (same ? N * (N + 1) / 2 : N * N);
            if (s1 != s0 && s2 != s0) {
                memset(out, 0, size * sizeof(double));
                out += size;
                continue;
            }
            for (long l = 0; l < L; l++)
                for (long n1 = 0; n1 < N; n1++) {
                    const double *first = moved + (l * N + n1) * row + 3 * s2 * W;
                    const double *second = moved + l * N * row + 3 * (s1 * W + n1);
                    for (long n2 = same ? n1 : 0; n2 < N; n2++)
                        for (int x = 0; x < 3; x++)
                            *out++ = (s1 == s0 ? first[3 * n2 + x] : 0) + (s2 == s0 ? second[n2 * row + x] : 0);
                }
        }
}

/* Derivatives of the power spectra of the centres from `first` on with respect to atoms, (n_entries, n_features, 3).
Those of row r are entries[r] ... entries[r + 1], that of the centre itself is own[r]. The pairs images[starts[e]] ...
images[starts[e + 1]], if there are any, lead to the atom of entry e. A centre and its own images move together. */
void soap_slopes(const Soap *s, long first, long n_rows, const long *entries, const long *own, const long *starts,
                 const long *images, long n_features, double *room, double *out, int threads) {
    const long L = s->l_max + 1, W = padded(s->n_max), step = s->n_species * W, size = soap_room(s);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long r = 0; r < n_rows; r++) {
        double *c = room + omp_get_thread_num() * size, *moved = c + L * L * step;
        double *rest = moved + 3 * L * s->n_max * step, *total = out + own[r] * 3 * n_features;
        coefficients(s, first + r, first + r + 1, 0, c, rest);
        memset(total, 0, 3 * n_features * sizeof(double));
        Block b;
        place(&b, s->l_max, rest);
        rest += block_room(s->l_max);
        for (long e = entries[r]; e < entries[r + 1]; e++) {
            if (e == own[r]) continue;
            double *p = out + e * 3 * n_features;
            if (starts[e] == starts[e + 1]) {
                memset(p, 0, 3 * n_features * sizeof(double));
                continue;
            }
            memset(moved, 0, 3 * L * s->n_max * step * sizeof(double));
            for (long begin = starts[e]; begin < starts[e + 1]; begin += LANES) {
                const long count = starts[e + 1] - begin < LANES ? starts[e + 1] - begin : LANES;
                fill(&b, s->l_max, s->vectors, images, begin, count);
                for (long i = 0; i < count; i++) move(s, &b, i, c, moved, rest);
            }
            feature_slopes(s, s->neighbour_species[images[starts[e]]], moved, p);
            for (long k = 0; k < 3 * n_features; k++) total[k] -= p[k];
        }
    }
}

typedef struct {
    long n_species, n_radial, n_near, n_angular; /* of the angular functions the first n_near are G4, the rest G5 */
    long n_pairs;
    double r_cut;
    const double *radial, *angular;              /* (n_radial, 2) eta, r_s; (n_angular, 3) eta, zeta, lambda */
    const long *centre, *neighbour_species;
    const double *vectors;                       /* (n_pairs, 3) */
} Symmetry;

/* Places for the neighbours of a centre: as many as the most that one has, and some to fill up. */
static long symmetry_places(const Symmetry *s) {
    long most = 0;
    for (long pair = 0, same = 0; pair < s->n_pairs; pair++) {
        same = pair && s->centre[pair] == s->centre[pair - 1] ? same + 1 : 1;
        most = same > most ? same : most;
    }
    return most + LANES;
}

/* Doubles of room that one thread needs. */
long symmetry_room(const Symmetry *s) { return 6 * symmetry_places(s) + s->n_angular * LANES; }

/* to += weight half^zeta for every lane; of a small whole exponent by squaring. */
static inline void add_power(const double *half, double zeta, const double *weight, double *to) {
    double base[LANES], power[LANES];
    memcpy(base, half, sizeof base);
    memcpy(power, weight, sizeof power);
    if (zeta == (long)zeta && zeta <= 64)
        for (long bits = zeta; bits; bits >>= 1)
#pragma omp simd
            for (int i = 0; i < LANES; i++) power[i] *= bits & 1 ? base[i] : 1, base[i] *= base[i];
    else
        for (int i = 0; i < LANES; i++) power[i] *= pow(base[i], zeta);
    for (int i = 0; i < LANES; i++) to[i] += power[i];
}

/* G2, then G4 and G5, of every centre. */
void symmetry_values(const Symmetry *s, long n_centres, long n_features, double *room, double *out, int threads) {
    const long S = s->n_species, size = symmetry_room(s), places = symmetry_places(s);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long centre = 0; centre < n_centres; centre++) {
        double *x = room + omp_get_thread_num() * size, *y = x + places, *z = y + places, *d = z + places;
        double *over = d + places, *f = over + places, *to = out + centre * n_features;
        double(*sums)[LANES] = (double(*)[LANES])(f + places);
        /* the neighbours by element */
        const long first = pairs_before(s->centre, s->n_pairs, centre);
        const long last = pairs_before(s->centre, s->n_pairs, centre + 1);
        long ends[S + 1], count = 0;
        ends[0] = 0;
        for (long species = 0; species < S; ends[++species] = count)
            for (long pair = first; pair < last; pair++)
                if (s->neighbour_species[pair] == species) {
                    const double *v = s->vectors + 3 * pair;
                    x[count] = v[0], y[count] = v[1], z[count] = v[2];
                    d[count] = sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
                    over[count] = 1 / d[count];
                    f[count] = d[count] < s->r_cut ? cutoff(d[count] / s->r_cut) : 0;
                    count++;
                }
        for (long k = count; k < count + LANES; k++) x[k] = y[k] = z[k] = d[k] = over[k] = f[k] = 0;
        for (long species = 0; species < S; species++)
            for (long r = 0; r < s->n_radial; r++) {
                const double eta = s->radial[2 * r], shift = s->radial[2 * r + 1];
                double sum = 0;
#pragma omp simd reduction(+ : sum)
                for (long k = ends[species]; k < ends[species + 1]; k++)
                    sum += f[k] * exponential(-eta * (d[k] - shift) * (d[k] - shift));
                *to++ = sum;
            }
        for (long high = 0; s->n_angular && high < S; high++)
            for (long low = 0; low <= high; low++) {
                memset(sums, 0, s->n_angular * sizeof *sums);
                for (long j = ends[high]; j < ends[high + 1]; j++)
                    for (long begin = low == high ? j + 1 : ends[low]; begin < ends[low + 1]; begin += LANES) {
                        double wide[LANES], apart[LANES], near[LANES], weight[LANES], half[2][LANES], gaussian[LANES];
                        const long end = ends[low + 1];
#pragma omp simd
                        for (int i = 0; i < LANES; i++) {
                            const long k = begin + i;
                            const double gx = x[j] - x[k], gy = y[j] - y[k], gz = z[j] - z[k];
                            const double cosine = (x[j] * x[k] + y[j] * y[k] + z[j] * z[k]) * over[j] * over[k];
                            const double square = gx * gx + gy * gy + gz * gz, t = sqrt(square) / s->r_cut;
                            weight[i] = f[j] * f[k] * (double)(k < end);
                            wide[i] = d[j] * d[j] + d[k] * d[k], apart[i] = wide[i] + square;
                            near[i] = weight[i] * cutoff(t < 1 ? t : 1);
                            half[0][i] = cosine > -1 ? 0.5 + 0.5 * cosine : 0;
                            half[1][i] = cosine < 1 ? 0.5 - 0.5 * cosine : 0;
                        }
                        for (long a = 0; a < s->n_angular; a++) {
                            const double *it = s->angular + 3 * a, eta = it[0];
                            /* functions of one width most often follow each other */
                            if (a == 0 || a == s->n_near || eta != it[-3])
#pragma omp simd
                                for (int i = 0; i < LANES; i++)
                                    gaussian[i] = a < s->n_near ? near[i] * exponential(-eta * apart[i])
                                                                : weight[i] * exponential(-eta * wide[i]);
                            add_power(half[it[2] < 0], it[1], gaussian, sums[a]);
                        }
                    }
                for (long a = 0; a < s->n_angular; a++) {
                    double sum = 0;
                    for (int i = 0; i < LANES; i++) sum += sums[a][i];
                    *to++ = 2 * sum;
                }
            }
    }
}

/* What compiled_sums.py must agree on. */
const int64_t layout[] = {sizeof(Soap), sizeof(Symmetry)};
