// What a block of the image encoder does to every token on its own (paper 3.1): norms, projections, and the feed-forward
// network. Between `project` and `finish` stands the attention (window_attention.h). The twin is Block of nn/encoder.py.
#pragma once

#include <cstdint>
#include <vector>

#include "packing.h"

namespace i2f {

class EncoderBlock {
public:
    // Weights by their names in the twin's state dict. Throws what `get` throws, and std::bad_alloc.
    EncoderBlock(std::int64_t width, std::int64_t hidden, const GetWeight& get, const Kernels& kernels);

    // qkv [rows, 3 C] of x [rows, C]. In float32, sums are made of short chains: softmax multiplies what queries and keys
    // are off, and a code of the click that lies near zero falls on the other side. Throws std::bad_alloc.
    void project(const float* x, std::int64_t rows, float* qkv) const;

    // x [rows, C] += proj(attended [rows, C]); x += fc2(gelu(fc1(norm2(x)))). Throws std::bad_alloc.
    void finish(float* x, const float* attended, std::int64_t rows) const;

    std::int64_t width() const { return width_; }
    const Kernels& kernels() const { return kernels_; }
    std::size_t bytes() const { return store_.bytes(); }

private:
    struct Part {  // of the hidden units
        LinearWeights in, out;
    };

    const Kernels& kernels_;
    std::int64_t width_;
    Store store_;
    const float *norm1_weight_, *norm1_bias_, *norm2_weight_, *norm2_bias_;
    LinearWeights qkv_, proj_;
    std::vector<Part> parts_;
};

}  // namespace i2f
