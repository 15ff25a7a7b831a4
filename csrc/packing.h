// Weights on their way from PyTorch's layout to that of the kernels.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "aligned.h"
#include "kernels.h"

namespace i2f {

// A weight by its name in the state dict, float32, contiguous; raises when it is missing or has another shape.
using GetWeight = std::function<const float*(const std::string& name, const std::vector<std::int64_t>& shape)>;

// Owns zero-filled, 64-byte aligned arrays.
class Store {
public:
    float* take(std::int64_t count) {
        const auto floats = static_cast<std::size_t>(count);
        arrays_.push_back(allocate<float>(floats));
        std::fill_n(arrays_.back().get(), floats, 0.0F);
        bytes_ += floats * sizeof(float);
        return arrays_.back().get();
    }

    // A copy, padded with zeros to a multiple of `step`.
    const float* copy(const float* from, std::int64_t count, std::int64_t step) {
        float* to = take(round_to(count, step));
        std::copy(from, from + count, to);
        return to;
    }

    // weight(output, term) and bias(output) as panels of P columns.
    template <class Weight, class Bias>
    LinearWeights linear(std::int64_t terms, std::int64_t outputs, std::int64_t panel, Weight weight, Bias bias) {
        float* w = take(round_to(outputs, panel) * terms);
        float* b = take(round_to(outputs, panel));
        for (std::int64_t j = 0; j < outputs; ++j) {
            float* to = w + j / panel * panel * terms + j % panel;
            for (std::int64_t k = 0; k < terms; ++k) to[k * panel] = weight(j, k);
            b[j] = bias(j);
        }
        return {terms, outputs, w, b};
    }

    std::size_t bytes() const { return bytes_; }

private:
    std::vector<Aligned<float>> arrays_;
    std::size_t bytes_ = 0;
};

constexpr std::int64_t blocks_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

}  // namespace i2f
