// Random calls of kernels.cpp: each tensor is a block of exactly its size on the heap, so that a sanitizer sees what is
// read or written beside it. The results are compared with sums in float64. Usage: kernel_cases SEED COUNT
#include "../../pop/backends/kernels.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

static std::mt19937 chance;

static long between(long least, long most) { return std::uniform_int_distribution<long>(least, most)(chance); }

static float as_float(float x) { return x; }
static float as_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static void set(float &to, float x) { to = x; }
static void set(uint16_t &to, float x) {  // bfloat16, cut
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to = bits >> 16;
}

template <typename number>
static std::unique_ptr<number[]> random_block(long count) {
  std::unique_ptr<number[]> block(new number[count]);
  std::normal_distribution<float> normal;
  for (long i = 0; i < count; i++) set(block[i], normal(chance));
  return block;
}

template <typename number>
static void check(const char *kernel, number found, double expected, double size) {
  const double tolerance = (sizeof(number) == 4 ? 1e-4 : 3e-2) * size;
  if (std::abs(as_float(found) - expected) <= tolerance) return;
  printf("%s gives %g, not %g\n", kernel, as_float(found), expected);
  exit(1);
}

// Strides of [B, T, H, E] in memory, laid out as [B, T, H, E] or as [B, H, T, E].
static void lay_out(int64_t *strides, long T, long H, long E) {
  const bool is_by_head = between(0, 1);
  strides[0] = T * H * E, strides[1] = is_by_head ? E : H * E, strides[2] = is_by_head ? T * E : E;
}

// Attention of T tokens to N keys. With one token, key n is in slot n % N and the span is never empty.
template <typename number, bool ONE_TOKEN>
static void try_attention() {
  const long widths[] = {2, 6, 10, 16, 48, 64, 80, 128, 256};
  const long E = widths[between(0, 8)], K = between(1, 3), H = K * between(1, 6), B = between(1, 2);
  const long T = ONE_TOKEN ? 1 : between(1, 60), N = between(1, 300);
  Sizes s{B, T, H, E, N, K};
  lay_out(&s.qb, T, H, E), lay_out(&s.kb, N, K, E), lay_out(&s.vb, N, K, E);
  auto q = random_block<number>(B * T * H * E), out = random_block<number>(B * T * H * E);
  auto k = random_block<number>(B * N * K * E), v = random_block<number>(B * N * K * E);
  std::unique_ptr<int32_t[]> held(new int32_t[B * N]), spans(new int32_t[B * T * 2]);
  for (long b = 0; b < B; b++) {
    const long latest = between(0, 2 * N), first_held = std::max(0L, latest - N + 1);
    for (long p = first_held; p < first_held + N; p++) held[b * N + p % N] = p;
    for (long t = 0; t < T; t++) {
      const long last = ONE_TOKEN ? latest : between(0, 2 * N), first = between(ONE_TOKEN ? first_held : 0, last + !ONE_TOKEN);
      spans[(b * T + t) * 2] = first, spans[(b * T + t) * 2 + 1] = last;
    }
  }
  const float scale = 1 / std::sqrt(float(E));
  const int threads = between(1, 3);
  if constexpr (ONE_TOKEN) attend_token(q.get(), k.get(), v.get(), spans.get(), out.get(), s, scale, threads);
  else attend(q.get(), k.get(), v.get(), held.get(), spans.get(), out.get(), s, scale, threads);

  for (long b = 0; b < B; b++)
    for (long t = 0; t < T; t++)
      for (long h = 0; h < H; h++) {
        const int32_t *span = spans.get() + (b * T + t) * 2;
        std::vector<double> sums(E);
        double total = 0;
        for (long n = 0; n < N; n++) {
          if (held[b * N + n] < span[0] || held[b * N + n] > span[1]) continue;
          double score = 0;
          for (long e = 0; e < E; e++)
            score += double(as_float(q[b * s.qb + t * s.qt + h * s.qh + e])) *
                     as_float(k[b * s.kb + n * s.kn + h / (H / K) * s.kh + e]);
          const double weight = std::exp(score * scale);
          total += weight;
          for (long e = 0; e < E; e++) sums[e] += weight * as_float(v[b * s.vb + n * s.vn + h / (H / K) * s.vh + e]);
        }
        for (long e = 0; e < E; e++)
          check(ONE_TOKEN ? "attend_token" : "attend", out[((b * T + t) * H + h) * E + e],
                total ? sums[e] / total : 0, 1 + std::abs(total ? sums[e] / total : 0));
      }
}

template <typename number>
static void try_product() {
  const long rows = between(1, MOST_ROWS), outs = between(1, 90), in = between(1, 80) * (64 / sizeof(number));
  auto x = random_block<number>(rows * in), w = random_block<number>(outs * in), out = random_block<number>(rows * outs);
  const int64_t sizes[] = {rows, in, outs};
  multiply_rows(x.get(), w.get(), out.get(), sizes, int(between(1, 3)));
  for (long r = 0; r < rows; r++)
    for (long o = 0; o < outs; o++) {
      double sum = 0;
      for (long i = 0; i < in; i++) sum += double(as_float(x[r * in + i])) * as_float(w[o * in + i]);
      check("multiply_rows", out[r * outs + o], sum, std::sqrt(double(in)));
    }
}

int main(int, char **arguments) {
  chance.seed(atoi(arguments[1]));
  const int count = atoi(arguments[2]);
  for (int i = 0; i < count; i++) {
    try_attention<float, false>(), try_attention<uint16_t, false>();
    try_attention<float, true>(), try_attention<uint16_t, true>();
    try_product<float>(), try_product<uint16_t>();
  }
  printf("%d cases of each kernel and dtype\n", count);
}
