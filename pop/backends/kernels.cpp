// CPU kernels: attention of chunks (`attend`), attention of one token a row (`attend_token`), and products of a few
// rows with a matrix (`multiply_rows`). pop.backends.cpu compiles this file for the processor that it runs on, and says
// what each function takes.
//
// Attention is softmax(q k^T) v, for a block of queries and a block of keys at a time. With several tokens, a vector
// holds one number of each of WIDTH queries, so no sum or maximum runs across the lanes of a vector:
//
//     scores[key][query]  =  sum over e    of k[key][e] times q[e][query]
//     sums[e][query]     +=  sum over keys of v[key][e] times weights[key][query]
//
// `multiply` computes both: it broadcasts numbers on the left and multiplies them by vectors on the right. The softmax
// keeps a running maximum (online softmax, Milakov and Gimelshein 2018), so only one block of scores is in memory.
//
// A 32-bit word holds one float32 number, or two bfloat16 numbers that are neighbours along the summed axis. AVX-512
// BF16 multiplies both and adds the products in one instruction. Scores, softmax and sums are float32.
//
// One token has too few queries for such blocks. There, a vector holds neighbouring numbers of a head, as in memory.

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// `multiply` sums ROWS times VECTORS vectors at once, each in a register.
#ifdef __AVX512F__
constexpr int WIDTH = 16, VECTORS = 3, ROWS = 8;
#else
constexpr int WIDTH = 8, VECTORS = 3, ROWS = 4;
#endif
constexpr int QUERIES = WIDTH * VECTORS, KEYS = 128;  // of a block
constexpr int MOST_E = 256, MOST_ROWS = 64;  // as in pop.backends.cpu

typedef float floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t word __attribute__((aligned(2), may_alias));  // a word of q, k or out, which may be unaligned

constexpr floats ZERO = {}, LEAST = ZERO - FLT_MAX;  // no score is less; finite, so that LEAST - LEAST is 0

struct Sizes {
  int64_t B, T, H, E, N, K;                    // shape letters of pop/models/layers.py
  int64_t qb, qt, qh, kb, kn, kh, vb, vn, vh;  // strides of q, k and v, in numbers; that of E is 1
};

// sum + a * b, where each word holds PER numbers
template <int PER>
static inline floats dot(floats sum, words a, words b) {
  if constexpr (PER == 1) return sum + (floats)a * (floats)b;
#ifdef __AVX512BF16__
  return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  return sum + (floats)(a << 16) * (floats)(b << 16) + (floats)(a & 0xffff0000u) * (floats)(b & 0xffff0000u);
#endif
}

// Float32 vectors as words: one vector as it is, or two vectors rounded to bfloat16, whose numbers share words.
template <int PER>
static inline words join(const floats *x) {
  if constexpr (PER == 1) return (words)x[0];
  else return (((words)x[0] + 0x8000) >> 16) | (((words)x[1] + 0x8000) & 0xffff0000u);
}

// 2^x for x <= 0: a polynomial for the fraction, which is from -1/2 to 1/2, times 2^integer. 0 if x < -126.
static inline floats exp2(floats x) {
  const floats shifted = x + 12582912.0f;  // 1.5 * 2^23: the integer is now in the lowest bits
  const floats f = x - (shifted - 12582912.0f);
  floats y = f * 0.00132647f + 0.00967151f;
  y = y * f + 0.05550734f;
  y = y * f + 0.24022242f;
  y = y * f + 0.69314698f;
  y = y * f + 1.0f;
  y *= (floats)(((words)shifted << 23) + (127u << 23));
  return x < -126.0f ? ZERO : y;
}

// c[r] = sum over p of a[r * row + p * step] * b[p]; if `add`, c[r] += that sum. A row of c and of b has VECTORS
// vectors. c has room for a multiple of ROWS rows.
template <int PER>
static inline void multiply(floats *c, const word *a, long row, long step, const words *b, long rows, long P,
                            bool add) {
  for (long r = 0; r < rows; r += ROWS) {
    const word *from[ROWS];
    floats sums[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++) {
      from[i] = a + std::min(r + i, rows - 1) * row;
      for (int j = 0; j < VECTORS; j++) sums[i][j] = add ? c[(r + i) * VECTORS + j] : ZERO;
    }
    for (long p = 0; p < P; p++) {
      words right[VECTORS];
      for (int j = 0; j < VECTORS; j++) right[j] = b[p * VECTORS + j];
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; i++) {
        words left = words{} + from[i][p * step];
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; j++) sums[i][j] = dot<PER>(sums[i][j], left, right[j]);
      }
    }
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < VECTORS; j++) c[(r + i) * VECTORS + j] = sums[i][j];
  }
}

// One block of queries: up to QUERIES of the T * G queries of a key-value head, in the order of their tokens. k belongs
// to that head, held and spans to the batch row. Each word of v holds the numbers of PER keys: [N / PER, E].
template <typename number>
static void attend_block(const number *const *q, const number *k, const word *v, const int32_t *held,
                         const int32_t *const *spans, number *const *out, long count, const Sizes &s, float scale) {
  constexpr int PER = 4 / sizeof(number);
  floats scores[KEYS * VECTORS], sums[MOST_E * VECTORS], most[VECTORS], total[VECTORS], x[PER];
  words queries[MOST_E / PER * VECTORS], weights[KEYS / PER * VECTORS];
  ints first[VECTORS], last[VECTORS];
  int least_first = INT_MAX, most_first = INT_MIN, least_last = INT_MAX, most_last = INT_MIN;
  for (long i = 0; i < QUERIES; i++) {  // a partial block repeats its last query
    const int32_t *span = spans[std::min(i, count - 1)];
    const word *from = (const word *)q[std::min(i, count - 1)];
    first[i / WIDTH][i % WIDTH] = span[0], last[i / WIDTH][i % WIDTH] = span[1];
    least_first = std::min(least_first, span[0]), most_first = std::max(most_first, span[0]);
    least_last = std::min(least_last, span[1]), most_last = std::max(most_last, span[1]);
    for (long p = 0; p < s.E / PER; p++) ((word *)queries)[p * QUERIES + i] = from[p];
  }
  std::fill(most, most + VECTORS, LEAST), std::fill(total, total + VECTORS, ZERO);
  std::fill(sums, sums + (s.E + ROWS - 1) / ROWS * ROWS * VECTORS, ZERO);
  const float c = scale * 1.44269504f;  // exp(x) = 2^(x / log(2))
  const auto is_needed = [&](long n) { return held[n] >= least_first && held[n] <= most_last; };

  for (long n = 0, keys; n < s.N; n += keys) {
    keys = 1;
    if (!is_needed(n)) continue;
    n -= n % PER;  // a word of v begins there
    keys = std::min<long>(KEYS, s.N - n);
    while (!is_needed(n + keys - 1)) keys--;
    multiply<PER>(scores, (const word *)(k + n * s.kn), s.kn / PER, 1, queries, keys, s.E / PER, false);

    floats before[VECTORS];
    std::copy(most, most + VECTORS, before);
    for (long r = 0; r < keys; r++) {
      floats *row = scores + r * VECTORS;
      int32_t at = held[n + r];
      if (at < most_first || at > least_last)
        for (int j = 0; j < VECTORS; j++) row[j] = (first[j] <= at) & (at <= last[j]) ? row[j] : ZERO - INFINITY;
      for (int j = 0; j < VECTORS; j++) most[j] = row[j] > most[j] ? row[j] : most[j];
    }
    if (keys % PER) std::fill(scores + keys * VECTORS, scores + (keys + 1) * VECTORS, ZERO - INFINITY);

    const long P = (keys + PER - 1) / PER;
    for (int j = 0; j < VECTORS; j++) {
      const floats factor = exp2((before[j] - most[j]) * c);
      total[j] *= factor;
      for (long e = 0; e < s.E; e++) sums[e * VECTORS + j] *= factor;
      for (long p = 0; p < P; p++) {
        for (int i = 0; i < PER; i++) total[j] += x[i] = exp2((scores[(p * PER + i) * VECTORS + j] - most[j]) * c);
        weights[p * VECTORS + j] = join<PER>(x);
      }
    }
    multiply<PER>(sums, v + n / PER * s.E, 1, s.E, weights, s.E, P, true);
  }

  for (int j = 0; j < VECTORS; j++) total[j] = total[j] == 0 ? ZERO + 1.0f : total[j];  // a query may attend no key
  for (long p = 0; p < s.E / PER; p++)
    for (int j = 0; j < VECTORS; j++) {
      for (int i = 0; i < PER; i++) x[i] = sums[(p * PER + i) * VECTORS + j] / total[j];
      queries[p * VECTORS + j] = join<PER>(x);
    }
  for (long i = 0; i < count; i++)
    for (long p = 0; p < s.E / PER; p++) ((word *)out[i])[p] = ((word *)queries)[p * QUERIES + i];
}

template <typename number>
static void attend(const number *q, const number *k, const number *v, const int32_t *held, const int32_t *spans,
                   number *out, const Sizes &s, float scale, int threads) {
  constexpr int PER = 4 / sizeof(number);
  const long G = s.H / s.K, P = (s.N + PER - 1) / PER, blocks = (s.T * G + QUERIES - 1) / QUERIES;
  std::unique_ptr<uint32_t[]> packed(new uint32_t[s.B * s.K * P * s.E]);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(3)
    for (long b = 0; b < s.B; b++)
      for (long head = 0; head < s.K; head++)
        for (long p = 0; p < P; p++) {
          const number *from = v + b * s.vb + head * s.vh + p * PER * s.vn;
          number *to = (number *)(packed.get() + ((b * s.K + head) * P + p) * s.E);
          for (long i = 0; i < PER; i++)
            for (long e = 0; e < s.E; e++) to[e * PER + i] = p * PER + i < s.N ? from[i * s.vn + e] : 0;
        }
#pragma omp for collapse(3) schedule(dynamic)
    for (long block = blocks - 1; block >= 0; block--)  // the blocks with most keys first
      for (long b = 0; b < s.B; b++)
        for (long head = 0; head < s.K; head++) {
          const number *rows[QUERIES];
          const int32_t *of[QUERIES];
          number *to[QUERIES];
          const long count = std::min<long>(QUERIES, s.T * G - block * QUERIES);
          for (long i = 0; i < count; i++) {
            const long t = (block * QUERIES + i) / G, h = head * G + (block * QUERIES + i) % G;
            rows[i] = q + b * s.qb + t * s.qt + h * s.qh;
            of[i] = spans + (b * s.T + t) * 2;
            to[i] = out + ((b * s.T + t) * s.H + h) * s.E;
          }
          const word *words_of_v = packed.get() + (b * s.K + head) * P * s.E;
          attend_block(rows, k + b * s.kb + head * s.kh, words_of_v, held + b * s.N, of, to, count, s, scale);
        }
  }
}

// Lane l of the result is the sum of the lanes l and l ^ W: of b if l has the bit W, and otherwise of a.
template <int W, int... LANE>
static inline floats sum_pairs(floats a, floats b, std::integer_sequence<int, LANE...>) {
  return floats{(LANE & W ? b : a)[LANE]...} + floats{(LANE & W ? b : a)[LANE ^ W]...};
}

// Lane l of the result is the sum of the lanes of x[l].
template <int W = 1>
static inline floats sum_lanes(floats *x) {
  if constexpr (W == WIDTH) return x[0];
  else {
    const std::make_integer_sequence<int, WIDTH> lanes;
    for (int i = 0; i < WIDTH; i += 2 * W) x[i] = sum_pairs<W>(x[i], x[i + W], lanes);
    return sum_lanes<2 * W>(x);
  }
}

// A vector of words whose first `count` numbers come from memory. The other numbers are zero.
template <typename number>
static inline words load(const number *from, long count) {
  words x = {};
  if (count >= long(sizeof(x) / sizeof(number))) memcpy(&x, from, sizeof(x));
  else memcpy(&x, from, count * sizeof(number));
  return x;
}

template <typename number>
static inline void store(words x, number *to, long count) {
  memcpy(to, &x, std::min<long>(count * sizeof(number), sizeof(x)));
}

// Number i of each word, as float32.
template <int PER>
static inline floats number_of(words x, int i) {
  if constexpr (PER == 1) return (floats)x;
  else return (floats)(i ? x & 0xffff0000u : x << 16);
}

// The attention of one query to some of its keys: the largest score, the sum of the weights, and the weighted sum of
// the values. Each vector of words of a value takes PER vectors of `sums`.
struct Part {
  float most, total;
  floats sums[MOST_E / WIDTH];
};

// G queries of one token attend the keys at positions `first` to `last`; position p is in slot p % s.N.
template <int G, typename number>
__attribute__((noinline)) static void attend_part(const number *q, const number *keys, const number *values,
                                                  long first, long last, const Sizes &s, float scale, Part *parts) {
  constexpr int PER = 4 / sizeof(number), IN_VECTOR = WIDTH * PER;  // numbers
  const float c = scale * 1.44269504f;  // exp(x) = 2^(x / log(2))
  floats scores[G][KEYS / WIDTH];
  for (int g = 0; g < G; g++) {
    parts[g].most = -FLT_MAX, parts[g].total = 0;
    std::fill(parts[g].sums, parts[g].sums + MOST_E / WIDTH, ZERO);
  }
  for (long begin = first; begin <= last; begin += KEYS) {
    const long count = std::min<long>(KEYS, last + 1 - begin);
    const number *k[KEYS], *v[KEYS];
    for (long n = 0, slot = begin % s.N; n < KEYS; n++) {  // a partial block repeats its last key
      k[n] = keys + slot * s.kn, v[n] = values + slot * s.vn;
      if (n < count - 1 && ++slot == s.N) slot = 0;
    }
    for (long n = 0; n < count; n += WIDTH) {
      for (int j = 0; j < WIDTH; j++)
        for (long e = 0; e < s.E; e += IN_VECTOR)  // of the next keys, and of these values
          __builtin_prefetch(k[n + j] + 2 * WIDTH * s.kn + e), __builtin_prefetch(v[n + j] + e);
      for (int g = 0; g < G; g++) {
        floats x[WIDTH] = {};
        for (long e = 0; e < s.E; e += IN_VECTOR) {
          const words mine = load(q + g * s.qh + e, s.E - e);
#pragma GCC unroll 16
          for (int j = 0; j < WIDTH; j++) x[j] = dot<PER>(x[j], load(k[n + j] + e, s.E - e), mine);
        }
        scores[g][n / WIDTH] = sum_lanes(x);
      }
    }
    for (int g = 0; g < G; g++) {
      float *all = (float *)scores[g], total = 0;
      const float before = parts[g].most, now = std::max(before, *std::max_element(all, all + count));
      for (long n = 0; n < count; n += WIDTH) scores[g][n / WIDTH] = exp2((scores[g][n / WIDTH] - now) * c);
      for (long n = 0; n < count; n++) total += all[n];
      const float factor = exp2(ZERO + (before - now) * c)[0];
      parts[g].most = now, parts[g].total = parts[g].total * factor + total;
      for (int i = 0; i < MOST_E / WIDTH; i++) parts[g].sums[i] *= factor;
    }
    for (long e = 0; e < s.E; e += IN_VECTOR) {
      floats sums[G][PER];
      for (int g = 0; g < G; g++) std::copy(parts[g].sums + e / WIDTH, parts[g].sums + e / WIDTH + PER, sums[g]);
      for (long n = 0; n < count; n++) {
        const words x = load(v[n] + e, s.E - e);
        for (int i = 0; i < PER; i++)
          for (int g = 0; g < G; g++) sums[g][i] += number_of<PER>(x, i) * ((float *)scores[g])[n];
      }
      for (int g = 0; g < G; g++) std::copy(sums[g], sums[g] + PER, parts[g].sums + e / WIDTH);
    }
  }
}

template <typename number>
static void attend_token(const number *q, const number *keys, const number *values, const int32_t *spans, number *out,
                         const Sizes &s, float scale, int threads) {
  constexpr int PER = 4 / sizeof(number), IN_VECTOR = WIDTH * PER;
  const long G = s.H / s.K, groups = (G + 3) / 4;  // of up to 4 queries
  long longest = 1;
  for (long b = 0; b < s.B; b++) longest = std::max<long>(longest, spans[2 * b + 1] + 1 - spans[2 * b]);
  const long P = std::min((4 * threads + s.B * s.K - 1) / (s.B * s.K), (longest + KEYS - 1) / KEYS);
  std::unique_ptr<Part[]> parts(new Part[s.B * P * s.H]);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(4) schedule(dynamic)
    for (long b = 0; b < s.B; b++)
      for (long p = 0; p < P; p++)
        for (long head = 0; head < s.K; head++)
          for (long group = 0; group < groups; group++) {
            const long h = head * G + group * 4, all = spans[2 * b + 1] + 1 - spans[2 * b], each = (all + P - 1) / P;
            const long first = spans[2 * b] + p * each, last = std::min<long>(first + each - 1, spans[2 * b + 1]);
            const auto run = [&](auto attend) {
              attend(q + b * s.qb + h * s.qh, keys + b * s.kb + head * s.kh, values + b * s.vb + head * s.vh, first,
                     last, s, scale, parts.get() + (b * P + p) * s.H + h);
            };
            switch (std::min(4L, G - group * 4)) {
              case 1: run(attend_part<1, number>); break;
              case 2: run(attend_part<2, number>); break;
              case 3: run(attend_part<3, number>); break;
              default: run(attend_part<4, number>);
            }
          }
#pragma omp for collapse(2)
    for (long b = 0; b < s.B; b++)
      for (long h = 0; h < s.H; h++) {
        const Part *part = parts.get() + b * P * s.H + h;
        float most = -FLT_MAX, total = 0;
        floats sums[MOST_E / WIDTH] = {};
        for (long p = 0; p < P; p++) most = std::max(most, part[p * s.H].most);
        for (long p = 0; p < P; p++) {
          const float factor = exp2(ZERO + (part[p * s.H].most - most) * scale * 1.44269504f)[0];
          total += part[p * s.H].total * factor;
          for (int i = 0; i < MOST_E / WIDTH; i++) sums[i] += part[p * s.H].sums[i] * factor;
        }
        for (long e = 0; e < s.E; e += IN_VECTOR) {
          for (int i = 0; i < PER; i++) sums[e / WIDTH + i] /= total == 0 ? 1 : total;  // 0 without keys
          store(join<PER>(sums + e / WIDTH), out + (b * s.H + h) * s.E + e, s.E - e);
        }
      }
  }
}

// out[r][o] = sum over i of x[r][i] * w[o][i]. With few rows, reading w takes most of the time.
//
// A tile is R rows of x times O rows of w. It has R * O = WIDTH sums, each a vector, so one call of `sum_lanes` reduces
// them all. The outer loop takes PART numbers of each row at a time, so that x stays in the first-level cache. With
// much to multiply, the processor fetches w too late by itself, so the code prefetches it.
template <int R, typename number>
static void multiply_tiles(const number *x, const number *w, number *out, long rows, long in, long outs, int threads) {
  constexpr int PER = 4 / sizeof(number), IN_VECTOR = WIDTH * PER, O = WIDTH / R, TILES = 4;
  constexpr long PART = 2048 / sizeof(number), AHEAD = 16384 / sizeof(number);
  const long tiles = (outs + O - 1) / O, groups = (rows + R - 1) / R;
#pragma omp parallel for num_threads(threads)
  for (long first = 0; first < tiles; first += TILES) {
    floats totals[TILES][MOST_ROWS / R];
    for (long tile = 0; tile < TILES; tile++) std::fill_n(totals[tile], groups, ZERO);
    for (long begin = 0; begin < in; begin += PART)
      for (long tile = 0; tile < TILES; tile++)
        for (long group = 0; group < groups; group++) {
          const number *a[R], *b[O];
          for (int r = 0; r < R; r++) a[r] = x + std::min(group * R + r, rows - 1) * in;
          for (int o = 0; o < O; o++) b[o] = w + std::min((first + tile) * O + o, outs - 1) * in;
          floats sums[WIDTH] = {};
          for (long i = begin; i < std::min(in, begin + PART); i += IN_VECTOR) {
            words left, right[O];
#pragma GCC unroll 16
            for (int o = 0; o < O; o++) {
              memcpy(&right[o], b[o] + i, sizeof(words));
              __builtin_prefetch(b[o] + i + AHEAD);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
              memcpy(&left, a[r] + i, sizeof(words));
#pragma GCC unroll 16
              for (int o = 0; o < O; o++) sums[r * O + o] = dot<PER>(sums[r * O + o], left, right[o]);
            }
          }
          totals[tile][group] += sum_lanes(sums);
        }
    for (long tile = 0; tile < TILES; tile++)
      for (long row = 0; row < rows; row++) {
        const floats sums[PER] = {totals[tile][row / R]};
        const words rounded = join<PER>(sums);  // the first number of each word is a rounded sum
        const long o = (first + tile) * O;
        for (int j = 0; j < O && o + j < outs; j++)
          memcpy(out + row * outs + o + j, (const char *)&rounded + (row % R * O + j) * 4, sizeof(number));
      }
  }
}

template <typename number>
static void multiply_rows(const number *x, const number *w, number *out, const int64_t *sizes, int threads) {
  const long rows = sizes[0], in = sizes[1], outs = sizes[2];
  if (rows == 1) multiply_tiles<1>(x, w, out, rows, in, outs, threads);
  else if (rows == 2) multiply_tiles<2>(x, w, out, rows, in, outs, threads);
  else if (rows <= 4) multiply_tiles<4>(x, w, out, rows, in, outs, threads);
  else multiply_tiles<8>(x, w, out, rows, in, outs, threads);
}

// How many numbers a view reaches from its first one on.
static int64_t reach(int64_t rows, int64_t row, int64_t tokens, int64_t token, int64_t heads, int64_t head, int64_t E) {
  return rows && tokens && heads ? (rows - 1) * row + (tokens - 1) * token + (heads - 1) * head + E : 0;
}

// Whether q, k, v and out are within their memory, of which `bytes` says how much there is.
template <typename number>
static bool has_room(const Sizes &s, const int64_t *bytes) {
  const int64_t sizes[] = {reach(s.B, s.qb, s.T, s.qt, s.H, s.qh, s.E), reach(s.B, s.kb, s.N, s.kn, s.K, s.kh, s.E),
                           reach(s.B, s.vb, s.N, s.vn, s.K, s.vh, s.E), s.B * s.T * s.H * s.E};
  for (int i = 0; i < 4; i++)
    if (sizes[i] * int64_t(sizeof(number)) > bytes[i]) return false;
  return s.E <= MOST_E && s.K > 0 && s.H % s.K == 0;
}

// Each function returns 0, or 1 if a tensor is smaller than the sizes say. It then reads and writes nothing.
extern "C" {
#define KERNELS(name, number)                                                                                          \
  int multiply_rows_##name(const number *x, const number *w, number *out, const int64_t *bytes, const int64_t *sizes,  \
                           int threads) {                                                                              \
    const int64_t rows = sizes[0], in = sizes[1], outs = sizes[2], size = sizeof(number);                              \
    if (rows > MOST_ROWS || rows * in * size > bytes[0] || outs * in * size > bytes[1] ||                              \
        rows * outs * size > bytes[2])                                                                                 \
      return 1;                                                                                                        \
    multiply_rows(x, w, out, sizes, threads);                                                                          \
    return 0;                                                                                                          \
  }                                                                                                                    \
  int attend_##name(const number *q, const number *k, const number *v, number *out, const int32_t *held,               \
                    const int32_t *spans, const int64_t *bytes, const Sizes *s, float scale, int threads) {            \
    if (!has_room<number>(*s, bytes) || s->B * s->N * 4 > bytes[4] || s->B * s->T * 8 > bytes[5]) return 1;            \
    attend(q, k, v, held, spans, out, *s, scale, threads);                                                             \
    return 0;                                                                                                          \
  }                                                                                                                    \
  int attend_token_##name(const number *q, const number *keys, const number *values, number *out,                      \
                          const int32_t *spans, const int64_t *bytes, const Sizes *s, float scale, int threads) {      \
    if (!has_room<number>(*s, bytes) || s->B * 8 > bytes[4]) return 1;                                                 \
    attend_token(q, keys, values, spans, out, *s, scale, threads);                                                     \
    return 0;                                                                                                          \
  }
KERNELS(float32, float)
KERNELS(bfloat16, uint16_t)
}
