#include "outline.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "thread_pool.h"

namespace i2f {
namespace {

thread_local Arena arena;
thread_local Arena view_arena;  // of what is looked at and the answer, while the network works in the other one

struct Map {
    float* data;
    std::int64_t height, width, channels;

    std::int64_t size() const { return height * width * channels; }
};

// Rows of [channels][2 height][2 width] to [height][width][4 channels]: four pixels as channels.
void gather(const float* x, std::int64_t channels, const Map& out) {
    const std::int64_t wide = 2 * out.width;
    for_items(out.height, threads(), [&](std::int64_t row, int) {
        float* to = out.data + row * out.width * out.channels;
        for (std::int64_t c = 0; c < channels; ++c) {
            for (std::int64_t part = 0; part < 4; ++part) {
                const float* from = x + (c * 2 * out.height + 2 * row + part / 2) * wide + part % 2;
                float* at = to + 4 * c + part;
                for (std::int64_t column = 0; column < out.width; ++column) at[column * out.channels] = from[2 * column];
            }
        }
    });
}

// [height][width][4] to [2 height][2 width].
void spread(const Map& x, float* out) {
    for (std::int64_t row = 0; row < x.height; ++row) {
        for (std::int64_t part = 0; part < 2; ++part) {
            float* to = out + (2 * row + part) * 2 * x.width;
            const float* from = x.data + row * x.width * 4 + 2 * part;
            for (std::int64_t column = 0; column < x.width; ++column) std::memcpy(to + 2 * column, from + 4 * column, 8);
        }
    }
}

// Means of 2 x 2 pixels.
void halve(const Map& x, const Map& out) {
    const std::int64_t channels = x.channels;
    for_items(out.height, threads(), [&](std::int64_t row, int) {
        const float* above = x.data + 2 * row * x.width * channels;
        const float* below = above + x.width * channels;
        float* to = out.data + row * out.width * channels;
        for (std::int64_t column = 0; column < out.width; ++column) {
            for (std::int64_t c = 0; c < channels; ++c) {
                to[c] = 0.25F * ((above[c] + above[channels + c]) + (below[c] + below[channels + c]));
            }
            above += 2 * channels;
            below += 2 * channels;
            to += channels;
        }
    });
}

// fine = silu(fine + every pixel of coarse four times).
void join(const Map& coarse, const Map& fine, const Kernels& kernels) {
    const std::int64_t channels = fine.channels;
    for_items(fine.height, threads(), [&](std::int64_t row, int) {
        float* to = fine.data + row * fine.width * channels;
        const float* from = coarse.data + row / 2 * coarse.width * channels;
        for (std::int64_t column = 0; column < fine.width; ++column) {
            const float* pixel = from + column / 2 * channels;
            for (std::int64_t c = 0; c < channels; ++c) to[column * channels + c] += pixel[c];
        }
        kernels.silu(to, fine.width * channels);
    });
}

}  // namespace

Outline::Outline(const std::vector<OutlineLayer>& layers, const std::vector<int>& down, const std::vector<int>& up,
                 const Kernels& kernels)
    : down_(down), up_(up) {
    const std::size_t strides = down.size();
    std::size_t expected = 2 * strides;  // the first and the last, one that narrows and one that widens for the others
    for (const int units : down) expected += 2 * static_cast<std::size_t>(std::max(units, 0));
    for (const int units : up) expected += 2 * static_cast<std::size_t>(std::max(units, 0));
    const auto negative = [](int units) { return units < 0; };
    if (strides == 0 || up.size() + 1 != strides || layers.size() != expected ||
        std::any_of(down.begin(), down.end(), negative) || std::any_of(up.begin(), up.end(), negative)) {
        throw std::invalid_argument("The layers are not those of an outline network.");
    }
    std::size_t next = 0;
    const auto require = [&](std::int64_t in, std::int64_t out) {
        if (layers[next].in != in || layers[next].out != out) {
            throw std::invalid_argument("A layer of the outline network has another width than its neighbours.");
        }
        ++next;
    };
    for (std::size_t k = 0; k < strides; ++k) {
        widths_.push_back(layers[next].out);
        require(k == 0 ? layers[0].in / 4 * 4 : widths_[k - 1], widths_[k]);
        for (int n = 0; n < 2 * down[k]; ++n) require(widths_[k], widths_[k]);
    }
    for (std::size_t k = strides - 1; k-- > 0;) {
        require(widths_[k + 1], widths_[k]);
        for (int n = 0; n < 2 * up[k]; ++n) require(widths_[k], widths_[k]);
    }
    require(widths_[0], 4);
    for (const OutlineLayer& layer : layers) {
        convolutions_.push_back(std::make_unique<Convolution>(layer.in, layer.out, layer.weight, layer.bias, kernels));
    }
}

void Outline::run(const float* x, std::int64_t height, std::int64_t width, float* out) const {
    const std::size_t strides = down_.size();
    // Of each stride three maps: the one that the way up joins, and two to work in.
    std::vector<Map> kept, first, second;
    std::int64_t floats = 0;
    for (std::size_t k = 0; k < strides; ++k) {
        const std::int64_t entering = k == 0 ? 4 * channels() : widths_[k - 1];
        const Map map{nullptr, height >> (k + 1), width >> (k + 1), std::max(entering, widths_[k])};
        for (std::vector<Map>* maps : {&kept, &first, &second}) {
            maps->push_back(map);
            floats += round_to(map.size(), 16);
        }
    }
    auto* memory = reinterpret_cast<float*>(arena.get(static_cast<std::size_t>(floats) * sizeof(float)));
    for (std::vector<Map>* maps : {&kept, &first, &second}) {
        for (Map& map : *maps) {
            map.data = memory;
            memory += round_to(map.size(), 16);
        }
    }

    std::size_t next = 0;
    const auto convolve = [&](const Map& from, Map& to, bool silu, const float* add = nullptr) {
        const Convolution& convolution = *convolutions_[next++];
        to.height = from.height;
        to.width = from.width;
        to.channels = convolution.outputs();
        double sums[2];
        convolution.run({from.data, from.height, from.width, nullptr, nullptr, add, silu, to.data, Lane::click}, sums);
    };
    const auto units = [&](int count, std::size_t k) {  // in `kept`
        for (int n = 0; n < count; ++n) {
            convolve(kept[k], first[k], true);
            convolve(first[k], second[k], true, kept[k].data);
            std::swap(kept[k], second[k]);
        }
    };

    first[0].channels = 4 * channels();
    gather(x, channels(), first[0]);
    for (std::size_t k = 0; k < strides; ++k) {
        if (k > 0) {
            first[k].channels = kept[k - 1].channels;
            halve(kept[k - 1], first[k]);
        }
        convolve(first[k], kept[k], true);
        units(down_[k], k);
    }
    for (std::size_t k = strides - 1; k-- > 0;) {
        convolve(kept[k + 1], first[k + 1], false);
        join(first[k + 1], kept[k], kernels());
        units(up_[k], k);
    }
    convolve(kept[0], first[0], false);
    spread(first[0], out);
}

bool Outline::draw(const View& view, const ViewRules& rules, float* out) const {
    const std::int64_t plane = view.height * view.width;
    const std::int64_t floats = (kViewChannels + 1) * plane;
    auto* const x = reinterpret_cast<float*>(view_arena.get(static_cast<std::size_t>(floats) * sizeof(float)));
    float* const change = x + kViewChannels * plane;
    look(view, rules, kernels(), x);
    run(x, view.height, view.width, change);
    return put_back(view, rules, change, out);
}

std::size_t Outline::bytes() const {
    std::size_t total = 0;
    for (const auto& convolution : convolutions_) total += convolution->bytes();
    return total;
}

}  // namespace i2f
