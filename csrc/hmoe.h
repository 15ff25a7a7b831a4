// Hybrid mixture of experts: weights packed once, then one fused pass a call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "kernels.h"

namespace i2f {

// Row-major, contiguous; Linear layers as [outputs, inputs]. Only read while packing.
struct FfnSource {
    const float *w1, *b1, *w2, *b2, *w3, *b3;  // [H, d], [H], [H, d], [H], [d, H], [d]
};

struct HmoeSource {
    std::int64_t width, hidden, experts;
    FfnSource shared;
    const float *shared_norm_weight, *shared_norm_bias;  // [H]
    FfnSource routed;                                    // each with a leading E
    const float *norm_weight, *norm_bias;                // [H], of all routed experts
    const float *shared_gate_weight, *shared_gate_bias;  // [1, d], [1]
    const float *expert_gate_weight, *expert_gate_bias;  // [E, d], [E]
    const float* expert_bias;                            // [E]
};

class Hmoe {
public:
    Hmoe(const HmoeSource& source, const Kernels& kernels);  // throws std::bad_alloc

    std::int64_t width() const { return width_; }
    std::int64_t experts() const { return gates_.experts; }
    const Kernels& kernels() const { return kernels_; }
    std::size_t bytes() const { return size_ * sizeof(float); }

    // out[i] = shared(x[i]), and for tokens with edge[i] != 0 blended with their routed expert.
    // Strides in floats, columns contiguous; out must not overlap x. Thread-safe. Throws std::bad_alloc before
    // anything is written. The result of a row depends on that row alone.
    void forward(const float* x, std::ptrdiff_t x_stride, const std::uint8_t* edge, std::int64_t tokens, float* out,
                 std::ptrdiff_t out_stride) const;

    // The expert of each row and the weight of the shared result.
    void route(const float* x, std::ptrdiff_t x_stride, std::int64_t tokens, std::int32_t* chosen, float* share) const;

private:
    std::size_t scratch_floats() const;  // of one thread

    const Kernels& kernels_;
    std::int64_t width_;
    std::int64_t hidden_;
    Aligned<float> memory_;
    std::size_t size_ = 0;
    FfnWeights shared_{};
    std::vector<FfnWeights> routed_;
    GateWeights gates_{};
};

}  // namespace i2f
