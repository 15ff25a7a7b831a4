// The outline network of inter2former/nn/outline.py, which says what it computes and why; that file is its twin.
// Batch norms are folded into the convolutions before they come here.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "convolution.h"
#include "view.h"

namespace i2f {

// A convolution's weights: weight [out, in, 3, 3], bias [out], contiguous.
struct OutlineLayer {
    std::int64_t in, out;
    const float *weight, *bias;
};

class Outline {
public:
    // layers  in the order in which they are applied: the first; of each further stride the one that narrows and
    //         twice its units; from the coarsest stride back the one that widens and twice its units; the last
    // down, up  units at each stride, fine to coarse
    // Throws std::invalid_argument when the layers are not such a network, std::bad_alloc.
    Outline(const std::vector<OutlineLayer>& layers, const std::vector<int>& down, const std::vector<int>& up,
            const Kernels& kernels);

    // x [channels][height][width] -> out [height][width]; both sides are multiples of side(). Throws std::bad_alloc.
    void run(const float* x, std::int64_t height, std::int64_t width, float* out) const;

    // The same for what a view shows, see view.h; its channels and sides fit. Returns whether what is added is finite.
    bool draw(const View& view, const ViewRules& rules, float* out) const;

    std::int64_t channels() const { return convolutions_.front()->inputs() / 4; }
    std::int64_t side() const { return std::int64_t{1} << down_.size(); }
    const Kernels& kernels() const { return convolutions_.front()->kernels(); }
    std::size_t bytes() const;

private:
    std::vector<std::unique_ptr<Convolution>> convolutions_;
    std::vector<std::int64_t> widths_;  // at each stride, fine to coarse
    std::vector<int> down_, up_;
};

}  // namespace i2f
