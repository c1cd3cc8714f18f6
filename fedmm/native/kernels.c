/* Sums and products of many small models on a processor: what fedmm/native/__init__.py calls.

   Libraries of linear algebra are made for large matrices, and on processors of other makers than their own they leave
   half of the arithmetic units idle. Here a tile of the result stays in registers while its sum runs. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEAD 4
#define MOST_OF_A_LEAF 8

/* Linear layers of a stack, with ReLU behind them or not: x [K, rows, inside], with its strides; weights
   [K, inside, outside] and biases [K, outside], that many numbers a client apart (0: all share them). */
struct dense {
    long clients, rows, inside, outside, x[3], rectified, of_weight, of_bias;
};

/* Convolutions of a stack, samples innermost: images [K, inside, *size, batch], kernels [K, outside, inside, *kernel]. */
struct convolution {
    long clients, batch, inside, outside, size[2], kernel[2], stride[2], padding[2], dilation[2], pooled, rectified,
        of_weight, of_bias;
};

/* Group normalisation of a stack, samples innermost: [K, channels, positions, batch]; factors and shifts [K, channels]. */
struct normalisation {
    long clients, groups, channels, positions, batch, rectified, of_scale, of_shift;
    double eps;
};

/* Features of a stack [K, M, rows, width] and centres [K, M, classes, width], that many numbers a client apart (0: all
   share them), as the least squared distances [K, M] are. */
struct attraction {
    long clients, modalities, rows, classes, width, of_centres, of_least;
};

/* -- memory ------------------------------------------------------------------------------------------------------- */

enum { COLUMNS_LEFT, IMAGE, WRAPPED, GRADIENT, OFFSETS, BACK, FACTORS_BACK, FOUND, PLACES };

static void *spare_bytes(int place, long bytes) {
    static _Thread_local struct {
        void *memory;
        long bytes;
    } kept[PLACES];
    if (kept[place].bytes < bytes) {
        free(kept[place].memory);
        bytes = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        kept[place].memory = aligned_alloc(64, bytes);
        kept[place].bytes = bytes;
        if (!kept[place].memory) abort();
    }
    return kept[place].memory;
}

static void fill_steps(long *steps, long count, long step) {
    for (long p = 0; p < count; p++) steps[p] = p * step;
}

/* Room for three lists of `count` numbers, of which the first holds multiples of `step`. */
static long *offsets(long count, long step) {
    long *at = spare_bytes(OFFSETS, 3 * (count > step ? count : step) * (long)sizeof(long));
    fill_steps(at, count, step);
    return at;
}

/* Where in an image [channels, *whole, batch] each tap of a kernel lies, from the window's first number on. */
static long *taps(const struct convolution *c, long channels, const long *whole, long batch) {
    long *at = spare_bytes(OFFSETS, 2 * channels * c->kernel[0] * c->kernel[1] * (long)sizeof(long)), *next = at;
    for (long i = 0; i < channels; i++)
        for (long y = 0; y < c->kernel[0]; y++)
            for (long x = 0; x < c->kernel[1]; x++)
                *next++ = ((i * whole[0] + y * c->dilation[0]) * whole[1] + x * c->dilation[1]) * batch;
    return at;
}

/* Numbers of two vectors by their places; older compilers know no vectors of other lengths. */
#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define PARTS_OF_VECTORS
#endif
#endif
#ifdef PARTS_OF_VECTORS
#define MIXED(order, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIXED(order, a, b, ...) __builtin_shuffle(a, b, (order){__VA_ARGS__})
#endif

/* -- every number format on every instruction set ------------------------------------------------------------------ */

/* kernels.inc gives each name the number of its format's bits and its level. */
#define JOIN_(f, bits, level) f##_f##bits##_##level
#define JOIN(f, bits, level) JOIN_(f, bits, level)
#define NAME(f) JOIN(f, BITS, LEVEL)

#if defined(__x86_64__)
#define LEVELS 3

#define LEVEL 2
#define VECTOR_BITS 512
#define ROWS 8
#define CORRELATED 8
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define BITS 32
#include "kernels.inc"
#define BITS 64
#include "kernels.inc"
#undef LEVEL
#undef VECTOR_BITS
#undef ROWS
#undef CORRELATED
#undef TARGET

#define LEVEL 1
#define VECTOR_BITS 256
#define ROWS 6
#define CORRELATED 4
#define TARGET __attribute__((target("avx2,fma")))
#define BITS 32
#include "kernels.inc"
#define BITS 64
#include "kernels.inc"
#undef LEVEL
#undef VECTOR_BITS
#undef ROWS
#undef CORRELATED
#undef TARGET

#else
#define LEVELS 1
#endif

#define LEVEL 0
#define VECTOR_BITS 128
#define ROWS 4
#define CORRELATED 4
#define TARGET
#define BITS 32
#include "kernels.inc"
#define BITS 64
#include "kernels.inc"

static int level;

static int best_level(void) {
#if LEVELS > 1
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

/* -- what Python calls --------------------------------------------------------------------------------------------- */

#if LEVELS > 1
#define BY_LEVEL(f, format, ...) \
    (level == 2 ? f##_##format##_2(__VA_ARGS__) : level == 1 ? f##_##format##_1(__VA_ARGS__) : f##_##format##_0(__VA_ARGS__))
#else
#define BY_LEVEL(f, format, ...) f##_##format##_0(__VA_ARGS__)
#endif
#define CALL(f, twice, ...)                 \
    do {                                    \
        if (twice)                          \
            BY_LEVEL(f, f64, __VA_ARGS__);  \
        else                                \
            BY_LEVEL(f, f32, __VA_ARGS__);  \
    } while (0)

void fedmm_linear(int twice, const struct dense *d, const void *x, const void *weight, const void *bias, void *out) {
    CALL(linear, twice, d, x, weight, bias, out);
}

void fedmm_linear_back(int twice, const struct dense *d, const void *x, const void *weight, const void *y,
                       const void *gradient, void *of_x, void *of_weight, void *of_bias) {
    CALL(linear_back, twice, d, x, weight, y, gradient, of_x, of_weight, of_bias);
}

void fedmm_convolve(int twice, const struct convolution *c, const void *x, const void *weight, const void *bias, void *out,
                    unsigned char *which) {
    CALL(convolve, twice, c, x, weight, bias, out, which);
}

void fedmm_convolve_back(int twice, const struct convolution *c, const void *x, const void *weight, const void *gradient,
                         const unsigned char *which, void *of_x, void *of_weight, void *of_bias) {
    CALL(convolve_back, twice, c, x, weight, gradient, which, of_x, of_weight, of_bias);
}

void fedmm_normalise(int twice, const struct normalisation *d, const void *x, const void *scale, const void *shift,
                     void *out, void *means, void *scales) {
    CALL(normalise, twice, d, x, scale, shift, out, means, scales);
}

void fedmm_normalise_back(int twice, const struct normalisation *d, const void *x, const void *scale, const void *y,
                          const void *gradient, const void *means, const void *scales, void *of_x, void *of_scale,
                          void *of_shift) {
    CALL(normalise_back, twice, d, x, scale, y, gradient, means, scales, of_x, of_scale, of_shift);
}

void fedmm_cross_entropy(int twice, long rows, long classes, const void *logits, const long long *labels, void *losses,
                         void *probabilities) {
    CALL(cross_entropy, twice, rows, classes, logits, labels, losses, probabilities);
}

void fedmm_cross_entropy_back(int twice, long rows, long classes, const void *probabilities, const long long *labels,
                              const void *gradient, void *of_logits) {
    CALL(cross_entropy_back, twice, rows, classes, probabilities, labels, gradient, of_logits);
}

void fedmm_soft_cross_entropy(int twice, long rows, long classes, const void *logits, const void *targets, void *losses,
                              void *probabilities) {
    CALL(soft_cross_entropy, twice, rows, classes, logits, targets, losses, probabilities);
}

void fedmm_distances(int twice, const struct attraction *d, const void *features, const void *centres, const void *least,
                     void *out) {
    CALL(distances, twice, d, features, centres, least, out);
}

void fedmm_pulls(int twice, const struct attraction *d, const void *features, const void *centres, const void *factors,
                 void *out) {
    CALL(pulls, twice, d, features, centres, factors, out);
}

void fedmm_class_sums(int twice, const struct attraction *d, const void *features, const long long *labels,
                      const unsigned char *present, double *sums, double *counts) {
    CALL(class_sums, twice, d, features, labels, present, sums, counts);
}

void fedmm_hits(int twice, const struct attraction *d, const void *features, const long long *labels,
                const unsigned char *present, const double *centres, const double *counts, double *hits) {
    CALL(hits, twice, d, features, labels, present, centres, counts, hits);
}

/* Of `count` tensors, of numbers[i] numbers each, rows [count, span]; what they give lies in `out` one after another. */
void fedmm_trees(int twice, long count, long span, long leaf, const long *numbers, const void *const *rows,
                 const double *weights, double *out) {
    for (long i = 0; i < count; out += numbers[i++])
        CALL(tree, twice, span, leaf, numbers[i], rows + i * span, weights, out);
}

/* Changes with what the functions take: fedmm/native/__init__.py passes by a library that another version built. */
int fedmm_version(void) { return 2; }

/* Use at most these instructions, -1: the best that the processor has; which are used. */
int fedmm_level(int wanted) {
    const int most = best_level();
    level = wanted < 0 || wanted > most ? most : wanted;
    return level;
}

/* -- the module: a library that a Python package builds and finds has to be one ------------------------------------ */

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernels", 0, -1, 0, 0, 0, 0, 0};

PyMODINIT_FUNC PyInit_kernels(void) {
    fedmm_level(-1);
    return PyModule_Create(&module);
}
