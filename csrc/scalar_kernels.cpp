// The scalar path: the specification of the other paths, in plain C++. Read this one first; tests compare with it.
#include <cmath>

#include "kernels.h"

namespace i2f {
namespace {

#include "mask_kernels.inc"

constexpr std::int64_t L = 4;  // as the portable path; only the packing depends on it

float sigmoid(float v) { return 1.0F / (1.0F + std::exp(-v)); }

std::int64_t row_of(const Rows& rows, std::int64_t i) {
    return rows.index != nullptr ? static_cast<std::int64_t>(rows.index[i]) : rows.first + i;
}

// sum[0 .. width) = bias + x . panel, terms added in the order of k
void product(const float* x, std::int64_t terms, const float* panel, const float* bias, float* sum,
             std::int64_t width = 2 * L) {
    for (std::int64_t j = 0; j < width; ++j) {
        sum[j] = bias[j];
        for (std::int64_t k = 0; k < terms; ++k) sum[j] += x[k] * panel[width * k + j];
    }
}

void layer_norm(float* v, std::int64_t count, const float* weight, const float* bias) {
    float mean = 0.0F;
    for (std::int64_t j = 0; j < count; ++j) mean += v[j];
    mean /= static_cast<float>(count);
    float variance = 0.0F;
    for (std::int64_t j = 0; j < count; ++j) variance += (v[j] - mean) * (v[j] - mean);
    variance /= static_cast<float>(count);
    const float scale = 1.0F / std::sqrt(variance + kNormEps);
    for (std::int64_t j = 0; j < count; ++j) v[j] = (v[j] - mean) * scale * weight[j] + bias[j];
}

void ffn(const FfnWeights& weights, const Rows& rows, const float* share, float* scratch) {
    const std::int64_t d = weights.width;
    const std::int64_t hidden = weights.hidden;
    float sum[2 * L];
    for (std::int64_t i = 0; i < rows.count; ++i) {
        const float* x = rows.x + row_of(rows, i) * rows.x_stride;
        float* out = rows.out + row_of(rows, i) * rows.out_stride;
        float* h = scratch;
        for (std::int64_t j0 = 0; j0 < hidden; j0 += L) {
            product(x, d, weights.w12 + 2 * j0 * d, weights.b12 + 2 * j0, sum);
            for (std::int64_t j = 0; j < L; ++j) h[j0 + j] = sum[j] * sigmoid(sum[j]) * sum[L + j];
        }
        layer_norm(h, hidden, weights.norm_weight, weights.norm_bias);
        for (std::int64_t j0 = 0; j0 < d; j0 += 2 * L) {
            product(h, hidden, weights.w3 + j0 * hidden, weights.b3 + j0, sum);
            const std::int64_t count = d - j0 < 2 * L ? d - j0 : 2 * L;
            for (std::int64_t j = 0; j < count; ++j) {
                out[j0 + j] = share == nullptr ? sum[j] : share[i] * out[j0 + j] + (1.0F - share[i]) * sum[j];
            }
        }
    }
}

void gates(const GateWeights& weights, const Rows& rows, std::int32_t* chosen, float* share, float* scratch) {
    const std::int64_t columns = round_to(weights.experts, L);
    for (std::int64_t i = 0; i < rows.count; ++i) {
        const float* x = rows.x + row_of(rows, i) * rows.x_stride;
        for (std::int64_t j0 = 0; j0 < columns; j0 += 2 * L) {
            const std::int64_t width = columns - j0 < 2 * L ? L : 2 * L;
            product(x, weights.width, weights.w + j0 * weights.width, weights.b + j0, scratch + j0, width);
        }
        float shared = 0.0F;
        product(x, weights.width, weights.shared, &weights.shared_b, &shared, 1);
        std::int32_t best = 0;
        for (std::int32_t e = 1; e < weights.experts; ++e) {
            if (sigmoid(scratch[e]) + weights.bias[e] > sigmoid(scratch[best]) + weights.bias[best]) best = e;
        }
        chosen[i] = best;
        share[i] = sigmoid(sigmoid(shared) - sigmoid(scratch[best]));
    }
}

namespace one_lane {

struct V {
    static constexpr std::int64_t lanes = 1;
    float v;

    static V set(float value) { return {value}; }
    static V load(const float* from) { return {*from}; }
    static V load_first(const float* from, std::int64_t) { return {*from}; }
    void store(float* to) const { *to = v; }
    void store_first(float* to, std::int64_t) const { *to = v; }
    V keep_first(std::int64_t) const { return *this; }
    static V fma(V a, V b, V c) { return {a.v * b.v + c.v}; }
    static V max(V a, V b) { return {a.v > b.v ? a.v : b.v}; }
    static V min(V a, V b) { return {a.v < b.v ? a.v : b.v}; }
    static V round(V a) { return {std::nearbyint(a.v)}; }
    static V scale(V a, V n) { return {std::ldexp(a.v, n.v == n.v ? static_cast<int>(n.v) : 0)}; }  // a * 2^n
    static float square_root(float a) { return std::sqrt(a); }
    V root() const { return {std::sqrt(v)}; }
    V inverse() const { return {1.0F / v}; }
    static void zip(V a, V b, float* to) {
        to[0] = a.v;
        to[1] = b.v;
    }
    float total() const { return v; }
};

inline V operator+(V a, V b) { return {a.v + b.v}; }
inline V operator-(V a, V b) { return {a.v - b.v}; }
inline V operator*(V a, V b) { return {a.v * b.v}; }
inline V operator/(V a, V b) { return {a.v / b.v}; }

constexpr bool kPairs = false;
constexpr int kTile = 1;

#include "vector.inc"
#include "click_kernels.inc"
#include "convolution_kernels.inc"

}  // namespace one_lane
}  // namespace

const Kernels kScalar = {"scalar", "one number at a time, the specification", L, 1, ffn, gates, min_max, find,
                         transition, one_lane::P, one_lane::kPairs, one_lane::linear, one_lane::norm, one_lane::pack_pixels,
                         one_lane::taps, one_lane::up_row, one_lane::attend, one_lane::bsq, one_lane::tile_in, one_lane::tile_out,
                         one_lane::silu, one_lane::sigmoid_of};

}  // namespace i2f
