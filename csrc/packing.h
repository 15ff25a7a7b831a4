// Weights on their way from PyTorch's layout to that of the kernels.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "aligned.h"
#include "kernels.h"

namespace i2f {

// A weight by its name in the state dict, float32, contiguous; raises when it is missing or has another shape.
using GetWeight = std::function<const float*(const std::string& name, const std::vector<std::int64_t>& shape)>;

// To bfloat16, ties to even; NaN stays NaN.
inline std::uint32_t bfloat16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) return (bits | 0x400000U) >> 16;
    return (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
}

// Number `index` of a column whose words are `stride` apart becomes bfloat16: half of a word, see FfnWeights.
inline void put_half(float* column, std::int64_t stride, std::int64_t index, float value) {
    const auto half = static_cast<std::uint16_t>(bfloat16(value));
    std::uint32_t word;
    std::memcpy(&word, column + index / 2 * stride, sizeof(word));
    word = index % 2 == 0 ? (word & 0xFFFF0000U) | half : (word & 0xFFFFU) | static_cast<std::uint32_t>(half) << 16;
    std::memcpy(column + index / 2 * stride, &word, sizeof(word));
}

// Number `index` of a column: a float, or half a word.
inline void put(float* column, std::int64_t stride, std::int64_t index, float value, bool pairs) {
    if (pairs) {
        put_half(column, stride, index, value);
    } else {
        column[index * stride] = value;
    }
}

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

    // weight(output, term) and bias(output) as panels of P columns, in bfloat16 where the path multiplies in it.
    template <class Weight, class Bias>
    LinearWeights linear(std::int64_t terms, std::int64_t outputs, const Kernels& kernels, Weight weight, Bias bias) {
        return linear(terms, outputs, kernels.panel, kernels.pairs, weight, bias);
    }

    // The same in float32.
    template <class Weight, class Bias>
    LinearWeights linear(std::int64_t terms, std::int64_t outputs, std::int64_t panel, Weight weight, Bias bias) {
        return linear(terms, outputs, panel, false, weight, bias);
    }

    std::size_t bytes() const { return bytes_; }

private:
    template <class Weight, class Bias>
    LinearWeights linear(std::int64_t terms, std::int64_t outputs, std::int64_t panel, bool pairs, Weight weight,
                         Bias bias) {
        const std::int64_t words = words_of(terms, pairs);
        float* w = take(round_to(outputs, panel) * words);
        float* b = take(round_to(outputs, panel));
        for (std::int64_t j = 0; j < outputs; ++j) {
            float* to = w + j / panel * panel * words + j % panel;
            for (std::int64_t k = 0; k < terms; ++k) put(to, panel, k, weight(j, k), pairs);
            b[j] = bias(j);
        }
        return {terms, outputs, terms, pairs, w, b};
    }

    std::vector<Aligned<float>> arrays_;
    std::size_t bytes_ = 0;
};

constexpr std::int64_t blocks_of(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

}  // namespace i2f
