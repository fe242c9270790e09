/* Matrix units for tokens: tiles of up to 16 rows of 64 bytes. Tiles 0 to 3 hold sums of 2 x 16 tokens by
 * 2 x 16 outputs, 4 and 5 the tokens, 6 and 7 the weights. With QK_AMX_EMULATED they are memory, for
 * tests on processors that have none. */
#ifndef QK_AMX_TILES_H
#define QK_AMX_TILES_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define QK_AMX_TOKENS 32

#ifdef QK_AMX_EMULATED

static __thread struct {
    uint8_t rows[8], bytes[8], data[8][16][64];
} qk_tile;

static inline void tile_zero(int t) { memset(qk_tile.data[t], 0, sizeof qk_tile.data[t]); }
static inline void tile_load(int t, const void *from, int64_t stride) {
    tile_zero(t);
    for (int r = 0; r < qk_tile.rows[t]; r++)
        memcpy(qk_tile.data[t][r], (const char *)from + r * stride, qk_tile.bytes[t]);
}
static inline void tile_store(int t, void *to, int64_t stride) {
    for (int r = 0; r < qk_tile.rows[t]; r++)
        memcpy((char *)to + r * stride, qk_tile.data[t][r], qk_tile.bytes[t]);
}
static inline void tile_bf16(int c, int a, int b) { /* sums of pairs, in the order of the manual */
    for (int m = 0; m < qk_tile.rows[c]; m++)
        for (int k = 0; k < qk_tile.bytes[a] / 4; k++)
            for (int n = 0; n < qk_tile.bytes[c] / 4; n++) {
                uint16_t x[2], w[2];
                float sum, p[2];
                memcpy(x, &qk_tile.data[a][m][4 * k], 4);
                memcpy(w, &qk_tile.data[b][k][4 * n], 4);
                memcpy(&sum, &qk_tile.data[c][m][4 * n], 4);
                for (int i = 0; i < 2; i++) {
                    const uint32_t u = (uint32_t)x[i] << 16, v = (uint32_t)w[i] << 16;
                    float f, g;
                    memcpy(&f, &u, 4), memcpy(&g, &v, 4);
                    p[i] = f * g;
                }
                sum = sum + p[0] + p[1];
                memcpy(&qk_tile.data[c][m][4 * n], &sum, 4);
            }
}
static inline void tile_int8(int c, int a, int b) { /* signed x, unsigned weights */
    for (int m = 0; m < qk_tile.rows[c]; m++)
        for (int k = 0; k < qk_tile.bytes[a] / 4; k++)
            for (int n = 0; n < qk_tile.bytes[c] / 4; n++) {
                uint32_t sum;
                memcpy(&sum, &qk_tile.data[c][m][4 * n], 4);
                for (int i = 0; i < 4; i++)
                    sum += (uint32_t)((int8_t)qk_tile.data[a][m][4 * k + i] * qk_tile.data[b][k][4 * n + i]);
                memcpy(&qk_tile.data[c][m][4 * n], &sum, 4);
            }
}
#define TILE_ZERO(t) tile_zero(t)
#define TILE_LOAD(t, from, stride) tile_load(t, from, stride)
#define TILE_STORE(t, to, stride) tile_store(t, to, stride)
#define TILE_BF16(c, a, b) tile_bf16(c, a, b)
#define TILE_INT8(c, a, b) tile_int8(c, a, b)

#else

#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_INT8(c, a, b) _tile_dpbsud(c, a, b)

#endif

static __thread int64_t qk_tile_tokens; /* what this thread's tiles are made for; 0: nothing */

/* Tiles for 1 to 32 tokens; a thread that has used them gives them back (`qk_tiles_done`). */
static inline void qk_tiles_for(int64_t tokens) {
    if (qk_tile_tokens == tokens) return;
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } made __attribute__((aligned(64))) = {.palette = 1};
    const uint8_t first = (uint8_t)(tokens < 16 ? tokens : 16), second = (uint8_t)(tokens - first);
    for (int t = 0; t < 8; t++) {
        const uint8_t rows = t >= 6 ? 16 : t == 0 || t == 1 || t == 4 ? first : second;
        made.rows[t] = rows, made.bytes[t] = rows ? 64 : 0;
    }
#ifdef QK_AMX_EMULATED
    for (int t = 0; t < 8; t++) qk_tile.rows[t] = made.rows[t], qk_tile.bytes[t] = (uint8_t)made.bytes[t];
#else
    _tile_loadconfig(&made);
#endif
    qk_tile_tokens = tokens;
}

static inline void qk_tiles_done(void) {
    if (!qk_tile_tokens) return;
#ifndef QK_AMX_EMULATED
    _tile_release();
#endif
    qk_tile_tokens = 0;
}

#endif
