// Dynamic prompt embedding (paper 3.2), computed only where neighbouring pixels differ.
//
// A position of a layer whose receptive field holds one state has one of 5 x 4 constant vectors: by the state, and by
// whether the field reaches over the crop's top, left or both. Only the others are computed, gathered into dense products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "packing.h"
#include "reference_mask.h"

namespace i2f {

class Prompt {
public:
    // widths: 5 (of the label embedding), c1, c2, c3, d. Throws std::bad_alloc.
    Prompt(const GetWeight& get, const std::int64_t (&widths)[5], const Kernels& kernels);

    // x[t] = tokens[t] + prompt[t], [height / 16 * width / 16, d]. The box is a multiple of 16 pixels. States 0 to 4.
    void add(const std::uint8_t* state, std::ptrdiff_t row_stride, std::int64_t height, std::int64_t width,
             const Box& box, const float* tokens, float* x) const;

    std::size_t bytes() const { return store_.bytes(); }

private:
    const Kernels& kernels_;
    std::int64_t widths_[5];
    Store store_;
    const float* first_ = nullptr;  // [9 taps][5 states][c1], and
    const float* first_bias_ = nullptr;
    LinearWeights layers_[5]{};  // 2 .. 4
    const float* tables_[5]{};   // 1 .. 4: [kSlots][width]
};

}  // namespace i2f
