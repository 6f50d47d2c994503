#include "core/pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/thread_pool.h"

namespace outdraft {
namespace {

constexpr int kLargest8 = 127;
constexpr float kNarrowest = 0.7f;  // of the widest scale: the last candidate of the search

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t to_half(float x) {
  const auto half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

float round_to_half(float x) { return static_cast<float>(static_cast<_Float16>(x)); }

// Nearest whole number, ties to even, for |x| < 2^22; vectorises on every CPU.
float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

void load_row(const Matrix& rows, int64_t row, int64_t k, float* out) {
  if (rows.dtype == DType::f32) {
    const auto* x = static_cast<const float*>(rows.data) + row * rows.stride;
    std::copy(x, x + k, out);
    return;
  }
  const auto* x = static_cast<const uint16_t*>(rows.data) + row * rows.stride;
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t bits = static_cast<uint32_t>(x[i]) << 16;
    std::memcpy(out + i, &bits, 4);
  }
}

uint8_t* lane(const Weight& w, int64_t row) {
  return const_cast<uint8_t*>(w.data) + row / kPanel * panel_bytes(w) + row % kPanel * 4;
}

void put_bf16(const Weight& w, int64_t row, const float* x) {
  uint8_t* out = lane(w, row);
  for (int64_t k = 0; k < w.k; ++k) {
    const uint16_t bits = to_bf16(x[k]);
    std::memcpy(out + k / 2 * kPanel * 4 + k % 2 * 2, &bits, 2);
  }
}

void put_w8(const Weight& w, int64_t row, const int8_t* q, float scale) {
  uint8_t* out = lane(w, row);
  int32_t sum = 0;
  for (int64_t k = 0; k < w.k; ++k) {
    out[k / 4 * kPanel * 4 + k % 4] = static_cast<uint8_t>(q[k]);
    sum += q[k];
  }
  static_cast<float*>(const_cast<void*>(w.scales))[row] = scale;
  static_cast<int32_t*>(const_cast<void*>(w.zeros))[row] = sum;
}

void put_w4_group(const Weight& w, int64_t row, int64_t group, const uint8_t* q, float scale,
                  int zero) {
  const int64_t begin = group * w.group, end = std::min<int64_t>(begin + w.group, w.k);
  uint8_t* out = lane(w, row);
  for (int64_t k = begin; k < end; ++k) {
    uint8_t& byte = out[k / 8 * kPanel * 4 + k % 4];
    byte = static_cast<uint8_t>(k % 8 < 4 ? (byte & 0xf0) | q[k - begin]
                                          : (byte & 0x0f) | (q[k - begin] << 4));
  }
  const int64_t groups = (w.k + w.group - 1) / w.group;
  const int64_t at = (row / kPanel * groups + group) * kPanel + row % kPanel;
  static_cast<uint16_t*>(const_cast<void*>(w.scales))[at] = to_half(scale);
  if (w.zeros) static_cast<uint8_t*>(const_cast<void*>(w.zeros))[at] = static_cast<uint8_t>(zero);
}

// Squared error of x on the grid scale * {low..high}.
float grid_error(const float* x, int64_t n, float scale, float low, float high) {
  const float inverse = 1.0f / scale;
  float error = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const float q = std::min(std::max(nearest(x[i] * inverse), low), high);
    const float d = q * scale - x[i];
    error += d * d;
  }
  return error;
}

// The best of `candidates` scales between `widest` and kNarrowest of it.
template <class Round>
float best_scale(const float* x, int64_t n, float widest, float low, float high, int candidates,
                 Round round) {
  float best = round(widest);
  if (candidates < 2) return best;
  float best_error = grid_error(x, n, best, low, high);
  for (int c = 1; c < candidates; ++c) {
    const float shrink = (1.0f - kNarrowest) * static_cast<float>(c) / (candidates - 1);
    const float scale = round(widest * (1.0f - shrink));
    const float error = scale == 0.0f ? INFINITY : grid_error(x, n, scale, low, high);
    if (error < best_error) {
      best = scale;
      best_error = error;
    }
  }
  return best;
}

void quantise_w8(const Weight& w, int64_t row, const float* x, int candidates, int8_t* q) {
  float widest = 0.0f;
  for (int64_t k = 0; k < w.k; ++k) widest = std::max(widest, std::fabs(x[k]));
  const auto same = [](float scale) { return scale; };
  const float scale = widest == 0.0f ? 0.0f
                                     : best_scale(x, w.k, widest / kLargest8, -kLargest8, kLargest8,
                                                  candidates, same);
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (int64_t k = 0; k < w.k; ++k) {
    const float value = nearest(x[k] * inverse);
    q[k] = static_cast<int8_t>(std::clamp<float>(value, -kLargest8, kLargest8));
  }
  put_w8(w, row, q, scale);
}

// Zero-point 8 and nibbles 0..15: the grid reaches to -8 but only to +7, so the value of largest
// size is put on -8 (the scale may be negative), as in GGUF's Q4_0.
void quantise_w4(const Weight& w, int64_t row, const float* x, int candidates, uint8_t* q) {
  for (int64_t begin = 0; begin < w.k; begin += w.group) {
    const int64_t n = std::min<int64_t>(w.group, w.k - begin);
    float extreme = 0.0f;
    for (int64_t i = 0; i < n; ++i)
      if (std::fabs(x[begin + i]) > std::fabs(extreme)) extreme = x[begin + i];
    float scale = round_to_half(extreme / -8.0f);
    if (scale != 0.0f)
      scale = best_scale(x + begin, n, extreme / -8.0f, -8.0f, 7.0f, candidates, round_to_half);
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    for (int64_t i = 0; i < n; ++i) {
      const float value = std::clamp(nearest(x[begin + i] * inverse), -8.0f, 7.0f);
      q[i] = static_cast<uint8_t>(value + 8.0f);
    }
    put_w4_group(w, row, begin / w.group, q, scale, 8);
  }
}

// Calls body(first, end) for shares of n rows, on all threads.
template <class Body>
void share_rows(int64_t n, const Body& body) {
  struct Context {
    int64_t n;
    const Body* body;
  } context{n, &body};
  Region region;
  region.context = &context;
  region.n_stages = 1;
  region.serial = [](const void*, int) { return false; };
  region.piece = [](const void* c, int, const Worker& worker) {
    const auto& shared = *static_cast<const Context*>(c);
    const Range rows = share(shared.n, worker);
    (*shared.body)(rows.begin, rows.end);
  };
  pool().run(region);
}

}  // namespace

void pack_floats(const Weight& w, const Matrix& rows, const RowRange& range, int candidates) {
  share_rows(range.n, [&](int64_t begin, int64_t end) {
    std::vector<float> x(w.k);
    std::vector<uint8_t> q(w.k + w.group);
    for (int64_t i = begin; i < end; ++i) {
      load_row(rows, i, w.k, x.data());
      const int64_t row = range.first + i;
      if (w.format == Format::bf16) put_bf16(w, row, x.data());
      if (w.format == Format::w8)
        quantise_w8(w, row, x.data(), candidates, reinterpret_cast<int8_t*>(q.data()));
      if (w.format == Format::w4) quantise_w4(w, row, x.data(), candidates, q.data());
    }
  });
}

void pack_w8(const Weight& w, const int8_t* rows, int64_t stride, const float* scales,
             const RowRange& range) {
  share_rows(range.n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) put_w8(w, range.first + i, rows + i * stride, scales[i]);
  });
}

void pack_w4(const Weight& w, const uint8_t* rows, int64_t stride, const float* scales,
             const uint8_t* zeros, const RowRange& range) {
  const int64_t groups = (w.k + w.group - 1) / w.group;
  share_rows(range.n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t g = 0; g < groups; ++g)
        put_w4_group(w, range.first + i, g, rows + i * stride + g * w.group, scales[i * groups + g],
                     zeros ? zeros[i * groups + g] : 8);
  });
}

}  // namespace outdraft
