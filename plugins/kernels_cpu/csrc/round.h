/* Activations to their codes and back, bit for bit as core's kernels/activations.py rounds them.
 *
 *     s     stored; or of the largest magnitude of a group: a float, a power of two (by a table of
 *           steps, so that every rule is one way), a small float under a factor
 *     y     (round(x / s + z) - z) * s
 *
 * Written as plain loops over a row of float32 that the compiler turns into vectors; compiled without
 * contraction. Magnitudes are compared as integers: what is not finite is seen at once, and left to the
 * caller with all its rules. */
#include <omp.h>

#include "common.h"
#include "round_calls.h"

#define BIG 8388608.0f /* 2^23: a sum with it has no bits below 1 */

QK_INLINE int32_t bits_of(float f) {
    int32_t i;
    memcpy(&i, &f, sizeof i);
    return i;
}

QK_INLINE float float_of(int32_t i) {
    float f;
    memcpy(&f, &i, sizeof f);
    return f;
}

QK_INLINE float with_sign(float magnitude, float of) {
    return float_of(bits_of(magnitude) | (bits_of(of) & INT32_MIN));
}

/* Whole number next to 0 <= a < 2^22. */
QK_INLINE float near(float a, int ties) {
    const float r = (a + BIG) - BIG;
    if (ties == QK_EVEN) return r;
    const float low = r > a ? r - 1.0f : r;
    return a - low == 0.5f ? (ties == QK_UP ? low + 1.0f : low) : r;
}

/* The nearest integer code, as a float. */
QK_INLINE float to_int(float v, float low, float high, int ties) {
    float c = v < low ? low : v;
    c = c > high ? high : c;
    return with_sign(near(float_of(bits_of(c) & INT32_MAX), ties), c);
}

/* The nearest value with `bits` fraction bits, in steps of 2^(exponent - bits) below the normal ones. */
QK_INLINE float to_float(float v, int32_t bits, int32_t exponent, float high, int minus_zero, int ties) {
    float a = float_of(bits_of(v) & INT32_MAX);
    a = a < high ? a : high;
    int32_t e = (bits_of(a) >> 23) - 127;
    e = e > exponent ? e : exponent;
    const float r = near(a * float_of((127 + bits - e) << 23), ties) * float_of((127 - bits + e) << 23);
    const float signed_ = with_sign(r, v);
    return minus_zero ? signed_ : (r == 0.0f ? r : signed_);
}

QK_INLINE float to_code(float v, const qk_rounded *c, int ties, int is_float) {
    if (is_float) return to_float(v, c->bits, c->exponent, c->high, c->minus_zero, ties);
    return to_int(v, c->low, c->high, ties);
}

/* Order of floats as that of integers, and back. */
QK_INLINE int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & INT32_MAX); }

typedef struct {
    float most, low, high; /* largest magnitude; least and largest value, 0 among them */
} range;

QK_INLINE range range_of(const float *v, int64_t n, int both) {
    range r = {0, 0, 0};
    int32_t most = 0, low = 0, high = 0;
    if (both) {
        for (int64_t i = 0; i < n; i++) {
            const int32_t o = ordered(bits_of(v[i]));
            low = o < low ? o : low;
            high = o > high ? o : high;
        }
        r.low = float_of(ordered(low)), r.high = float_of(high);
        return r;
    }
    for (int64_t i = 0; i < n; i++) {
        const int32_t b = bits_of(v[i]) & INT32_MAX;
        most = b > most ? b : most;
    }
    r.most = float_of(most);
    return r;
}

static inline float bounded(float s, const qk_rounding *r) {
    s = s < (float)r->least ? (float)r->least : s;
    return r->most > 0 && s > (float)r->most ? (float)r->most : s;
}

/* The scale of a group, and in *zero its zero point. NaN: not to be had here. */
static inline float scale_of(const qk_round_call *c, range g, float factor, float *zero) {
    const qk_rounding *r = c->rule;
    const float peak = r->peak, eps = r->eps;
    if (r->zero) {
        const float low = r->code.low, high = r->code.high;
        float s = (g.high - g.low) / (float)(r->code.high - r->code.low);
        s = s == 0.0f ? eps : s;
        float z = low - g.low / s;
        z = z < low ? low : z;
        z = z > high ? high : z;
        *zero = with_sign(near(float_of(bits_of(z) & INT32_MAX), QK_EVEN), z);
        return s;
    }
    if (r->kind == QK_EXPONENT) {
        const int32_t bits = bits_of(bounded(g.most, r));
        const int32_t byte = c->steps[bits >> 23] + (bits >= c->steps[256 + (bits >> 23)]);
        return byte >= 255 ? float_of(0x7FC00000) : float_of(byte ? byte << 23 : 0x00400000);
    }
    if (r->kind == QK_FLOAT) {
        float s = g.most / peak;
        if (r->factor) s *= factor;
        s = bounded(s, r);
        return s == 0.0f ? eps : s;
    }
    float s = r->factor_inverse ? factor * (g.most / peak) : g.most / (peak * (r->factor ? factor : 1.0f));
    s = to_code(bounded(s, r), &r->scale, QK_EVEN, 1);
    s = s == 0.0f ? eps : s;
    if (!r->factor) return s;
    return r->factor_inverse ? s / factor : s * factor;
}

#define EACH(Q, Y)                          \
    for (int64_t i = 0; i < n; i++) {       \
        const float q = (Q);                \
        v[i] = (Y);                         \
    }

/* v of one group in place; `is_float` is known where this is expanded. */
QK_INLINE void round_group(float *restrict v, int64_t n, float s, float z, const qk_rounding *r,
                           int is_float) {
    const qk_rounded code = r->code;
    const int ties = r->ties;
    if (ties == QK_EVEN && !r->zero && !r->inverse) {
        EACH(to_code(v[i] / s, &code, QK_EVEN, is_float), q * s)
    } else if (ties == QK_EVEN && !r->inverse) {
        EACH(to_code(v[i] / s + z, &code, QK_EVEN, is_float), (q - z) * s)
    } else if (r->zero) {
        EACH(to_code((r->inverse ? v[i] * s : v[i] / s) + z, &code, ties, is_float),
             r->inverse ? (q - z) / s : (q - z) * s)
    } else {
        EACH(to_code(r->inverse ? v[i] * s : v[i] / s, &code, ties, is_float), r->inverse ? q / s : q * s)
    }
}

static void read_row(const void *x, int64_t type, int64_t at, int64_t n, float *restrict v) {
    int64_t i = 0;
    if (type == QK_F32) memcpy(v, (const float *)x + at, n * sizeof *v);
    else if (type == QK_F16) {
        const uint16_t *h = (const uint16_t *)x + at;
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(v + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
        for (; i < n; i++) v[i] = _cvtsh_ss(h[i]);
    } else
        for (const uint16_t *h = (const uint16_t *)x + at; i < n; i++) v[i] = float_of((int32_t)h[i] << 16);
}

static void write_row(const float *restrict v, void *y, int64_t type, int64_t at, int64_t n) {
    int64_t i = 0;
    if (type == QK_F32) memcpy((float *)y + at, v, n * sizeof *v);
    else if (type == QK_F16) {
        uint16_t *h = (uint16_t *)y + at;
        for (; i + 8 <= n; i += 8)
            _mm_storeu_si128((__m128i *)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(v + i), 0));
        for (; i < n; i++) h[i] = _cvtss_sh(v[i], 0);
    } else
        for (uint16_t *h = (uint16_t *)y + at; i < n; i++) {
            const uint32_t b = (uint32_t)bits_of(v[i]);
            h[i] = (uint16_t)((b + 0x7FFF + (b >> 16 & 1)) >> 16);
        }
}

static inline int finite(float f) { return (bits_of(f) & INT32_MAX) < 0x7F800000; }

/* Row `row`; `all` is the range of the whole tensor where the rule asks for it. */
static int NAME(one_row)(const qk_round_call *c, int64_t row, range all, float *v) {
    const qk_rounding *r = c->rule;
    const int64_t k = c->k, own = row * c->stride;
    read_row(c->x, c->type, row * k, k, v);
    const range token = range_of(v, k, 0);
    if (!finite(token.most)) return 3;
    float factor = 1.0f;
    if (r->factor == QK_FACTOR_STORED) factor = c->stored[own];
    else if (r->factor) {
        const float most = r->factor == QK_FACTOR_TENSOR ? all.most : token.most;
        factor = most / (float)r->factor_over;
        factor = most == 0.0f || (r->factor_plain && factor == 0.0f) ? 1.0f : factor;
    }
    for (int64_t g = 0; g < k; g += c->group) {
        const int64_t n = qk_min(c->group, k - g), at = own + (c->per_group ? g / c->group : 0);
        float z = 0.0f, s;
        if (r->kind == QK_STORED) {
            s = c->stored[at];
            if (r->zero) z = c->zeros[at];
        } else if (r->whole) s = scale_of(c, all, factor, &z);
        else if (!r->zero && n == k) s = scale_of(c, token, factor, &z);
        else s = scale_of(c, range_of(v + g, n, r->zero), factor, &z);
        if (!(s > 0.0f) || !finite(s)) return 3;
        if (r->code.bits < 0) round_group(v + g, n, s, z, r, 0);
        else round_group(v + g, n, s, z, r, 1);
    }
    write_row(v, c->y, c->type, row * k, k);
    return 0;
}

#define ON_STACK 4096

int NAME(qk_round)(const qk_round_call *c, int64_t threads) {
    const qk_rounding *r = c->rule;
    range all = {0, 0, 0};
    int failed = 0;
    if (c->rows * c->k < 1 << 15 || c->rows < 2) threads = 1;
    const int64_t row_bytes = qk_div_up(c->k * (int64_t)sizeof(float), 64) * 64;
    float stack[ON_STACK] __attribute__((aligned(64)));
    char *scratch = (char *)stack;
    if (threads > 1 || c->k > ON_STACK) scratch = qk_alloc(row_bytes * threads);
    if (!scratch) return 1;
    if (r->whole || r->factor == QK_FACTOR_TENSOR)
        for (int64_t i = 0; i < c->rows; i++) {
            float *v = (float *)scratch;
            read_row(c->x, c->type, i * c->k, c->k, v);
            const range both = range_of(v, c->k, 1), one = range_of(v, c->k, 0);
            if (!finite(one.most)) failed = 3;
            all.most = one.most > all.most ? one.most : all.most;
            all.low = both.low < all.low ? both.low : all.low;
            all.high = both.high > all.high ? both.high : all.high;
        }
    if (failed) threads = 0;
    if (threads == 1)
        for (int64_t i = 0; i < c->rows && !failed; i++) failed = NAME(one_row)(c, i, all, (float *)scratch);
    else if (threads > 1) {
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
        for (int64_t i = 0; i < c->rows; i++)
            failed |= NAME(one_row)(c, i, all, (float *)(scratch + row_bytes * omp_get_thread_num()));
    }
    if (scratch != (char *)stack) free(scratch);
    return failed;
}
