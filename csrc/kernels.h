// The border between what is compiled once and what is compiled per instruction set: plain structs and function
// pointers. No standard library and no inline code here, so that no object built with AVX flags can lend its copy
// of a shared function to a CPU without AVX.
#pragma once

#include <cstddef>
#include <cstdint>

namespace i2f {

// One feed-forward network g(x) = w3 norm(silu(w1 x + b1) * (w2 x + b2)) + b3, packed for a path of L lanes.
// Rows of w1 and w2 (or of w3) become panels of 2L columns, so that one panel feeds one register tile; short
// panels are filled with zeros. All pointers are 64-byte aligned.
struct FfnWeights {
    std::int64_t width;        // d, of x and of the result
    std::int64_t hidden;       // H
    const float* w12;          // [ceil(H / L)][d][L of w1, L of w2]
    const float* b12;          // [ceil(H / L)][L of b1, L of b2]
    const float* norm_weight;  // [H rounded up to L]
    const float* norm_bias;    // [H rounded up to L]
    const float* w3;           // [ceil(d / 2L)][H][2L]
    const float* b3;           // [d rounded up to 2L]
};

// The gates of all experts, then the gate of the shared network, as one linear map of E + 1 columns.
struct GateWeights {
    std::int64_t width;    // d
    std::int64_t experts;  // E
    const float* w;        // [ceil((E + 1) / 2L)][d][2L]
    const float* b;        // [E + 1 rounded up to 2L]
    const float* bias;     // [E]; moves the choice of the expert, never its weight
};

// Up to kMaxRows rows of x and of the result. Row i is at index[i], or at first + i where index is null.
struct Rows {
    const float* x;
    std::ptrdiff_t x_stride;  // floats from row to row
    float* out;
    std::ptrdiff_t out_stride;
    const std::int32_t* index;
    std::int64_t first;
    std::int64_t count;
};

constexpr std::int64_t kMaxRows = 48;
constexpr float kNormEps = 1e-5F;

// One instruction set. `ffn` and `gates` use `scratch`, 64-byte aligned, of scratch_floats() floats (hmoe.h).
struct Kernels {
    const char* name;
    const char* sentence;
    std::int64_t lanes;  // L
    std::int64_t tile;   // rows of the register tile

    // out = g(x), or out = share[i] * out + (1 - share[i]) * g(x) where share is given.
    void (*ffn)(const FfnWeights& weights, const Rows& rows, const float* share, float* scratch);

    // chosen[i] = argmax_e(sigmoid(gate_e) + bias_e), the first of equals;
    // share[i] = sigmoid(sigmoid(shared gate) - sigmoid(gate of the chosen)).
    void (*gates)(const GateWeights& weights, const Rows& rows, std::int32_t* chosen, float* share, float* scratch);

    // low[j] = min(low[j], row[j]), high[j] = max(high[j], row[j])
    void (*min_max)(const std::uint8_t* row, std::int64_t count, std::uint8_t* low, std::uint8_t* high);

    // found[j] |= row[j] == value
    void (*find)(const std::uint8_t* row, std::int64_t count, std::uint8_t value, std::uint8_t* found);

    // out = the reference mask after a prediction (0 or not); returns the largest state that was met.
    std::uint8_t (*transition)(const std::uint8_t* state, const std::uint8_t* prediction, std::int64_t count,
                               std::uint8_t* out);
};

extern const Kernels kScalar;
extern const Kernels kPortable;
#ifdef I2F_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace i2f
