/* The sweeps of engine.py, one task per element and member, and the two Jacobian products, one task per structure.

A task runs its small matrix products on one thread while its arrays stay in that core's cache, and the element-wise
work between two products is one pass. Every result is written by one task, so the numbers do not depend on the number
of threads. Arrays are row-major. */

/* Precisions: float32, float64 */

#include "compiled.h"

#define BLOCK 16
#define MAX_LAYERS 8

/* Networks of one element. Hidden layer l keeps, per member, A = [a; h] and D = [y; d], each (2 n_atoms, width). */
typedef struct {
    long n_atoms, first;
    real *weight[MAX_LAYERS], *bias[MAX_LAYERS];
    real *weight_slope[MAX_LAYERS], *bias_slope[MAX_LAYERS]; /* null where a layer does not train */
    real *A[MAX_LAYERS], *D[MAX_LAYERS];
    long width[MAX_LAYERS];
} Net;

/* Matrix products. A tile of C, ROWS by WIDTH, stays in registers while the inner index runs over a packed panel of B
(inner, WIDTH) and over single elements of A. The matrices here are small enough for the cache, so that only the
panel, which is read again for every ROWS rows, is worth a copy. Weights come from memory when a task begins, though, and
a panel of them is a line here and a line there, which no processor foresees: the next panel is asked for meanwhile. */
#define ROWS 6
#define WIDTH (2 * VECTOR)
#define MAX_INNER 256
#define PACK_ABOVE 18 /* rows that make the copy of a panel worth while */

/* tile (rows, WIDTH) += A panel; A has element (i, k) at i * row_step + k * inner_step. */
static inline __attribute__((always_inline)) void tile_product(int rows, long inner, const real *A, long row_step,
                                                               long inner_step, const real *panel, long panel_step,
                                                               vector tile[][2]) {
    vector sum[ROWS][2];
    for (int i = 0; i < rows; i++) sum[i][0] = tile[i][0], sum[i][1] = tile[i][1];
    for (long k = 0; k < inner; k++, A += inner_step, panel += panel_step) {
        __builtin_prefetch(panel + WIDTH);
        const vector left = *(const vector *)panel, right = *(const vector *)(panel + VECTOR);
        for (int i = 0; i < rows; i++) {
            const real a = A[i * row_step];
            sum[i][0] += a * left, sum[i][1] += a * right;
        }
    }
    for (int i = 0; i < rows; i++) tile[i][0] = sum[i][0], tile[i][1] = sum[i][1];
}

/* The same for the left half of the tile alone, where B ends: few atoms are few columns. Always ROWS rows, the last one
again and again if there are fewer: a compiler may round a loop for one row otherwise than a loop for six, and results
must not depend on where in a batch an atom stands. */
static void half_tile(long rows, long inner, const real *A, long row_step, long inner_step, const real *panel,
                      long panel_step, vector tile[][2]) {
    vector sum[ROWS];
    const real *row[ROWS];
    for (int i = 0; i < ROWS; i++) sum[i] = tile[i][0], row[i] = A + (i < rows ? i : rows - 1) * row_step;
    for (long k = 0; k < inner; k++, panel += panel_step)
        for (int i = 0; i < ROWS; i++) sum[i] += row[i][k * inner_step] * *(const vector *)panel;
    for (long i = 0; i < rows; i++) tile[i][0] = sum[i];
}

/* C = A B for the elements (i, k), (k, j), (i, j) at the given steps; exactly one step of B and of C is 1. */
static void product(long rows, long columns, long inner, const real *A, long A_row, long A_inner, const real *B,
                    long B_inner, long B_column, real *C, long C_row, long C_column) {
    real panel[MAX_INNER * WIDTH] __attribute__((aligned(64)));
    for (long j = 0; j < columns; j += WIDTH) {
        const long width = columns - j < WIDTH ? columns - j : WIDTH;
        for (long first = 0; first < inner; first += MAX_INNER) {
            const long depth = inner - first < MAX_INNER ? inner - first : MAX_INNER;
            const real *from = B + first * B_inner + j * B_column;
            long step = B_inner;
            if (width < WIDTH || B_column != 1 || rows > PACK_ABOVE) {
                if (width == WIDTH && B_column == 1)
                    for (long k = 0; k < depth; k++) {
                        memcpy(panel + k * WIDTH, from + k * B_inner, WIDTH * sizeof(real));
                        __builtin_prefetch(from + k * B_inner + WIDTH);
                    }
                else
                    for (long k = 0; k < depth; k++)
                        for (long l = 0; l < WIDTH; l++)
                            panel[k * WIDTH + l] = l < width ? from[k * B_inner + l * B_column] : 0;
                from = panel, step = WIDTH;
            }
            for (long i = 0; i < rows; i += ROWS) {
                vector tile[ROWS][2] = {{{0}}};
                const real *a = A + i * A_row + first * A_inner;
                real *c = C + i * C_row + j * C_column;
                const long height = rows - i < ROWS ? rows - i : ROWS;
                if (first)
                    for (long r = 0; r < height; r++)
                        for (long l = 0; l < width; l++) ((real *)tile[r])[l] = c[r * C_row + l * C_column];
                if (width <= VECTOR)
                    half_tile(height, depth, a, A_row, A_inner, from, step, tile);
                else switch (height) {
                case 6: tile_product(6, depth, a, A_row, A_inner, from, step, tile); break;
                case 5: tile_product(5, depth, a, A_row, A_inner, from, step, tile); break;
                case 4: tile_product(4, depth, a, A_row, A_inner, from, step, tile); break;
                case 3: tile_product(3, depth, a, A_row, A_inner, from, step, tile); break;
                case 2: tile_product(2, depth, a, A_row, A_inner, from, step, tile); break;
                default: tile_product(1, depth, a, A_row, A_inner, from, step, tile);
                }
                if (width == WIDTH && C_column == 1)
                    for (long r = 0; r < height; r++) memcpy(c + r * C_row, tile[r], sizeof tile[r]);
                else
                    for (long l = 0; l < width; l++)
                        for (long r = 0; r < height; r++) c[r * C_row + l * C_column] = ((real *)tile[r])[l];
            }
        }
    }
}

/* C (rows, columns) = op(A) op(B) for row-major arrays. With B transposed, C^T = B op(A)^T is computed instead, so
that the weights, the larger of the two, are never the packed ones. */
static void gemm(char transpose_a, char transpose_b, long rows, long columns, long inner, const real *A, long lda,
                 const real *B, long ldb, real *C, long ldc) {
    const long A_row = transpose_a == 'T' ? 1 : lda, A_inner = transpose_a == 'T' ? lda : 1;
    if (transpose_b == 'T')
        product(columns, rows, inner, B, ldb, 1, A, A_inner, A_row, C, 1, ldc);
    else
        product(rows, columns, inner, A, A_row, A_inner, B, ldb, 1, C, ldc, 1);
}

/* Slope of CELU from its value: exp(z / alpha) = a / alpha + 1 below zero. The sum rounds to zero or a little below for
a saturated unit, which weights of a diverging training would make visible. */
static inline real slope(real a, real inverse) {
    const real s = a * inverse + 1;
    return a < 0 ? (s > 0 ? s : 0) : 1;
}

/* Step 1: atomic energies per member (members, N), d of every layer, g = de/dG summed over members (N, K).
X holds G and v of element after element: rows 2 first ... are G, the next n_atoms are v. */
void forward(const Net *nets, long n_nets, long members, long hidden, long K, long N, const real *X, real alpha,
             real factor, real *atomic, real *g_members, real *g, int threads) {
    const real inverse = 1 / alpha;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < n_nets * members; task++) {
            const Net *net = nets + task / members;
            const long m = task % members, n = net->n_atoms;
            const real *input = X + 2 * net->first * K;
            long n_in = K;
            for (long l = 0; l < hidden; l++) {
                const long w = net->width[l];
                const real *bias = net->bias[l] + m * w;
                real *a = net->A[l] + m * 2 * n * w;
                gemm('N', 'N', n, w, n_in, input, n_in, net->weight[l] + m * n_in * w, w, a, w);
                for (long i = 0; i < n; i++)
#pragma omp simd
                    for (long j = 0; j < w; j++) {
                        const real z = a[i * w + j] + bias[j];
                        const real e = alpha * (exponential((z > 0 ? 0 : z) * inverse) - 1);
                        a[i * w + j] = z > 0 ? z : e;
                    }
                input = a, n_in = w;
            }
            const real *last = net->weight[hidden] + m * n_in, *a = input;
            real *d = net->D[hidden - 1] + m * 2 * n * n_in + n * n_in;
            for (long i = 0; i < n; i++) {
                real sum = 0;
#pragma omp simd reduction(+ : sum)
                for (long j = 0; j < n_in; j++) {
                    sum += a[i * n_in + j] * last[j];
                    d[i * n_in + j] = slope(a[i * n_in + j], inverse) * last[j] * factor;
                }
                atomic[m * N + net->first + i] = sum + net->bias[hidden][m];
            }
            for (long l = hidden - 1; l > 0; l--) {
                const long w = net->width[l], below = net->width[l - 1];
                const real *a = net->A[l - 1] + m * 2 * n * below;
                real *q = net->D[l - 1] + m * 2 * n * below + n * below;
                gemm('N', 'T', n, below, w, d, w, net->weight[l] + m * below * w, w, q, below);
#pragma omp simd
                for (long j = 0; j < n * below; j++) q[j] *= slope(a[j], inverse);
                d = q;
            }
            const long w = net->width[0];
            gemm('N', 'T', n, K, w, d, w, net->weight[0] + m * K * w, w, g_members + (m * N + net->first) * K, K);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < N; i++) {
            memcpy(g + i * K, g_members + i * K, K * sizeof(real));
            for (long m = 1; m < members; m++)
#pragma omp simd
                for (long j = 0; j < K; j++) g[i * K + j] += g_members[(m * N + i) * K + j];
        }
    }
}

/* AdamW: where weights and moments begin, and its constants; `decay` = 1 - rate * weight_decay, and the corrections are
1 - beta^step of both moments. */
typedef struct {
    real *weight, *exp_avg, *exp_avg_sq;
    double rate, decay, beta1, beta2, correction1, correction2, eps;
} Update;

/* One step of `count` weights; a null gradient is one of zeros. */
static void adamw_range(const Update *u, real *weight, const real *restrict g, long count) {
    real *restrict p = weight, *restrict m = u->exp_avg + (weight - u->weight);
    real *restrict v = u->exp_avg_sq + (weight - u->weight);
    const real decay = u->decay, b1 = u->beta1, b2 = u->beta2, rate = u->rate / u->correction1;
    const real rest1 = 1 - u->beta1, rest2 = 1 - u->beta2; /* rounded once, from double */
    const real root = 1 / sqrt(u->correction2), eps = u->eps;
    for (long first = 0; first < count; first += BLOCK) {
        const long last = first + BLOCK < count ? first + BLOCK : count;
        real slopes[BLOCK] = {0};
        if (g) memcpy(slopes, g + first, (last - first) * sizeof(real));
#pragma omp simd
        for (long j = first; j < last; j++) {
            const real slope = slopes[j - first];
            m[j] = b1 * m[j] + rest1 * slope;
            v[j] = b2 * v[j] + rest2 * slope * slope;
            p[j] = decay * p[j] - rate * m[j] / (SQRT(v[j]) * root + eps);
        }
    }
}

/* A step of weights whose gradient is zero. */
void adamw_without_gradient(const Update *update, real *weight, long count, int threads) {
    const long part = 16384;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long j = 0; j < count; j += part) adamw_range(update, weight + j, 0, count - j < part ? count - j : part);
}

/* Steps 3 and 4: tangent up, reverse sweep down to the lowest layer that trains; c is dL/dE per merged atom. With an
update, every array of weights takes its AdamW step as soon as it has served; its gradient, in `scratch`, never leaves
the cache, and the other threads keep the arithmetic units busy meanwhile. */
void reverse(const Net *nets, long n_nets, long members, long hidden, long K, const real *X, const real *c, real alpha,
             real factor, real *scratch, long scratch_size, long upper_size, const Update *update, int threads) {
    const real inverse = 1 / alpha;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long task = 0; task < n_nets * members; task++) {
        const Net *net = nets + task / members;
        const long m = task % members, n = net->n_atoms;
        const real *input = X + (2 * net->first + n) * K, *slopes_e = c + net->first;
        real *upper = scratch + omp_get_thread_num() * scratch_size, *own_slope = upper + upper_size;
        long n_in = K, lowest = 0;
        while (!net->weight_slope[lowest]) lowest++;
        for (long l = 0; l < hidden; l++) {
            const long w = net->width[l];
            const real *a = net->A[l] + m * 2 * n * w;
            real *h = net->A[l] + m * 2 * n * w + n * w, *t = net->D[l] + m * 2 * n * w;
            gemm('N', 'N', n, w, n_in, input, n_in, net->weight[l] + m * n_in * w, w, t, w);
#pragma omp simd
            for (long j = 0; j < n * w; j++) h[j] = slope(a[j], inverse) * t[j];
            input = h, n_in = w;
        }
        if (net->weight_slope[hidden]) {
            const real *a = net->A[hidden - 1] + m * 2 * n * n_in;
            real *out = net->weight_slope[hidden] + m * n_in, sum = 0;
            memset(out, 0, n_in * sizeof(real));
            for (long i = 0; i < n; i++) {
#pragma omp simd
                for (long j = 0; j < n_in; j++)
                    out[j] += factor * (slopes_e[i] * a[i * n_in + j] + input[i * n_in + j]);
                sum += slopes_e[i];
            }
            net->bias_slope[hidden][m] = factor * sum;
            if (update) {
                adamw_range(update, net->weight[hidden] + m * n_in, out, n_in);
                adamw_range(update, net->bias[hidden] + m, net->bias_slope[hidden] + m, 1);
            }
        }
        for (long l = hidden - 1; l >= lowest; l--) {
            const long w = net->width[l], below = l ? net->width[l - 1] : K;
            const real *a = net->A[l] + m * 2 * n * w;
            real *y = net->D[l] + m * 2 * n * w; /* holds t so far */
            const real *d = y + n * w;
            /* p t q = d t / alpha where z < 0 and zero elsewhere */
            for (long i = 0; i < n; i++) {
                const real ci = slopes_e[i];
                const int top = l == hidden - 1;
#pragma omp simd
                for (long j = i * w; j < (i + 1) * w; j++) {
                    const real bend = a[j] < 0 ? d[j] * y[j] * inverse : 0;
                    y[j] = bend + (top ? d[j] * ci : slope(a[j], inverse) * upper[j]);
                }
            }
            if (net->weight_slope[l]) {
                /* a^T y + h^T d and G^T y + v^T d, each as one product: the largest arrays are written once */
                const real *both = l ? net->A[l - 1] + m * 2 * n * below : X + 2 * net->first * K;
                real *bias = net->bias_slope[l] + m * w;
                real *out = update ? own_slope : net->weight_slope[l] + m * below * w;
                gemm('T', 'N', below, w, 2 * n, both, below, y, w, out, w);
                memset(bias, 0, w * sizeof(real));
                for (long i = 0; i < n; i++)
#pragma omp simd
                    for (long j = 0; j < w; j++) bias[j] += y[i * w + j];
            }
            if (l > lowest) gemm('N', 'T', n, below, w, y, w, net->weight[l] + m * below * w, w, upper, below);
            if (update && net->weight_slope[l]) {
                adamw_range(update, net->weight[l] + m * below * w, own_slope, below * w);
                adamw_range(update, net->bias[l] + m * w, net->bias_slope[l] + m * w, w);
            }
        }
    }
}

/* One structure of a batch: its Jacobian and where its atoms stand. */
typedef struct {
    long n_atoms, first;     /* first: its first atom, structures following one another */
    const real *values;      /* (n_blocks, 3, BLOCK) */
    const int *atoms, *starts;
} Sparse;

/* F = -J^T g; row[i] is the row of g that belongs to atom i. */
void jacobian_transposed(const Sparse *structures, long count, long K, const long *row, const real *g, real *forces,
                         int threads) {
    const long parts = K / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long s = 0; s < count; s++) {
        const Sparse *p = structures + s;
        real *F = forces + 3 * p->first;
        memset(F, 0, 3 * p->n_atoms * sizeof(real));
        for (long i = 0; i < p->n_atoms * parts; i++) {
            const real *left = g + row[p->first + i / parts] * K + i % parts * BLOCK;
            for (long b = p->starts[i]; b < p->starts[i + 1]; b++) {
                const real *value = p->values + b * 3 * BLOCK;
                real x = 0, y = 0, z = 0;
#pragma omp simd reduction(+ : x, y, z)
                for (int j = 0; j < BLOCK; j++) {
                    x += left[j] * value[j];
                    y += left[j] * value[BLOCK + j];
                    z += left[j] * value[2 * BLOCK + j];
                }
                real *f = F + 3 * p->atoms[b];
                f[0] -= x, f[1] -= y, f[2] -= z;
            }
        }
    }
}

/* v = -J r, written to row[i] of X. */
void jacobian(const Sparse *structures, long count, long K, const long *row, const real *r, real *X, int threads) {
    const long parts = K / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long s = 0; s < count; s++) {
        const Sparse *p = structures + s;
        for (long i = 0; i < p->n_atoms * parts; i++) {
            real sum[BLOCK] = {0};
            for (long b = p->starts[i]; b < p->starts[i + 1]; b++) {
                const real *value = p->values + b * 3 * BLOCK, *q = r + 3 * (p->first + p->atoms[b]);
#pragma omp simd
                for (int j = 0; j < BLOCK; j++)
                    sum[j] -= q[0] * value[j] + q[1] * value[BLOCK + j] + q[2] * value[2 * BLOCK + j];
            }
            memcpy(X + row[p->first + i / parts] * K + i % parts * BLOCK, sum, sizeof sum);
        }
    }
}

/* What compiled_sweeps.py must agree on. */
const int64_t layout[] = {BLOCK, MAX_LAYERS, sizeof(Net), sizeof(Sparse), sizeof(Update)};
