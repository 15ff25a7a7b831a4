#include "view.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "aligned.h"
#include "thread_pool.h"

namespace i2f {
namespace {

constexpr std::int64_t kLogits = 3, kClicks = 5, kBefore = 7, kLatest = 9;

thread_local Arena arena;

// For every output of one axis the inputs that it is made of, next to one another: their mean where there are more of
// them, or else the two nearest. As OpenCV's INTER_AREA and INTER_LINEAR.
struct Axis {
    std::vector<std::int64_t> first;
    std::vector<std::int64_t> count;
    std::vector<float> weights;  // `most` for each output
    std::int64_t most;

    const float* weight(std::int64_t output) const { return weights.data() + output * most; }
};

Axis means(std::int64_t inputs, std::int64_t outputs) {
    const double scale = static_cast<double>(inputs) / static_cast<double>(outputs);
    Axis axis{{}, {}, {}, static_cast<std::int64_t>(scale) + 2};
    axis.weights.assign(static_cast<std::size_t>(axis.most * outputs), 0.0F);
    for (std::int64_t output = 0; output < outputs; ++output) {
        const double begin = static_cast<double>(output) * scale;
        const double end = std::min(begin + scale, static_cast<double>(inputs));
        const auto first = static_cast<std::int64_t>(begin);
        const auto last = std::clamp(static_cast<std::int64_t>(std::ceil(end)), first + 1, std::min(first + axis.most, inputs));
        axis.first.push_back(first);
        axis.count.push_back(last - first);
        for (std::int64_t input = first; input < last; ++input) {
            const double part = std::min(end, static_cast<double>(input + 1)) - std::max(begin, static_cast<double>(input));
            axis.weights[static_cast<std::size_t>(output * axis.most + input - first)] =
                static_cast<float>(std::max(part, 0.0) / (end - begin));
        }
    }
    return axis;
}

Axis nearest_two(std::int64_t inputs, std::int64_t outputs) {
    const double scale = static_cast<double>(inputs) / static_cast<double>(outputs);
    Axis axis{{}, {}, {}, 2};
    for (std::int64_t output = 0; output < outputs; ++output) {
        const double at = std::clamp((static_cast<double>(output) + 0.5) * scale - 0.5, 0.0, static_cast<double>(inputs - 1));
        const std::int64_t first = std::min(static_cast<std::int64_t>(at), std::max<std::int64_t>(inputs - 2, 0));
        const auto rest = static_cast<float>(at - static_cast<double>(first));
        axis.first.push_back(first);
        axis.count.push_back(std::min<std::int64_t>(2, inputs));
        axis.weights.push_back(1.0F - rest);
        axis.weights.push_back(rest);
    }
    return axis;
}

// A row of the picture, still as wide as it came, then as wide as the crop and with colours as the network knows them.
void colours(const View& view, const ViewRules& rules, const Axis& down, const Axis& across, std::int64_t row,
             float* wide, float* x) {
    const std::int64_t plane = view.height * view.width;
    const std::int64_t count = 3 * view.picture_columns;
    std::fill_n(wide, count, 0.0F);
    for (std::int64_t k = 0; k < down.count[static_cast<std::size_t>(row)]; ++k) {
        const std::uint8_t* from = view.picture + (down.first[static_cast<std::size_t>(row)] + k) * view.picture_stride;
        const float weight = down.weight(row)[k];
        for (std::int64_t i = 0; i < count; ++i) wide[i] += weight * static_cast<float>(from[i]);
    }
    for (std::int64_t column = 0; column < view.shown_width; ++column) {
        const float* from = wide + 3 * across.first[static_cast<std::size_t>(column)];
        const float* weights = across.weight(column);
        float sums[3] = {};
        for (std::int64_t k = 0; k < across.count[static_cast<std::size_t>(column)]; ++k, from += 3) {
            for (int c = 0; c < 3; ++c) sums[c] += weights[k] * from[c];
        }
        for (int c = 0; c < 3; ++c) x[c * plane + row * view.width + column] = (sums[c] - rules.mean[c]) / rules.deviation[c];
    }
}

// A row of logits, and of their chance.
void logits_row(const View& view, const ViewRules& rules, const float* logits, const Axis& down, const Axis& across,
                std::int64_t row, const Kernels& kernels, float* scaled, float* chance) {
    const auto at = static_cast<std::size_t>(row);
    const auto sure = [&](float value) { return std::clamp(value, -rules.sure, rules.sure); };
    const float* above = logits + down.first[at] * view.columns;
    const float* below = above + (down.count[at] - 1) * view.columns;
    const float low = down.weight(row)[1];
    for (std::int64_t column = 0; column < view.width; ++column) {
        const std::int64_t left = across.first[static_cast<std::size_t>(column)];
        const std::int64_t right = left + across.count[static_cast<std::size_t>(column)] - 1;
        const float part = across.weight(column)[1];
        const float a = sure(above[left]) + part * (sure(above[right]) - sure(above[left]));
        const float b = sure(below[left]) + part * (sure(below[right]) - sure(below[left]));
        chance[column] = a + low * (b - a);
        scaled[column] = chance[column] / rules.scale;
    }
    kernels.sigmoid(chance, view.width);
}

// One axis of a click's blob: where it begins and how high it is there, as far as the crop reaches.
struct Slope {
    std::int64_t first = 0;
    std::vector<float> heights;
};

Slope slope(double at, const ViewRules& rules, std::int64_t side) {
    const double reach = rules.far * rules.blob;
    Slope found;
    const double end = std::min(std::ceil(at + reach), static_cast<double>(side));
    const double begin = std::max(std::floor(at - reach), 0.0);
    if (!(begin < end)) return found;
    found.first = static_cast<std::int64_t>(begin);
    for (std::int64_t place = found.first; static_cast<double>(place) < end; ++place) {
        const double away = static_cast<double>(place) - at;
        found.heights.push_back(static_cast<float>(std::exp(away * away / (-2.0 * rules.blob * rules.blob))));
    }
    return found;
}

void put_click(const View& view, const Slope& down, const Slope& across, float* map) {
    for (std::size_t i = 0; i < down.heights.size(); ++i) {
        float* to = map + (down.first + static_cast<std::int64_t>(i)) * view.width + across.first;
        for (std::size_t j = 0; j < across.heights.size(); ++j) to[j] = std::max(to[j], down.heights[i] * across.heights[j]);
    }
}

}  // namespace

void look(const View& view, const ViewRules& rules, const Kernels& kernels, float* x) {
    const std::int64_t plane = view.height * view.width;
    const bool shrinks = view.shown_height <= view.picture_rows && view.shown_width <= view.picture_columns;
    const bool shows = view.picture_rows > 0 && view.picture_columns > 0;
    Axis picture_down{}, picture_across{};
    if (shows) {
        const auto axis = shrinks ? means : nearest_two;
        picture_down = axis(view.picture_rows, view.shown_height);
        picture_across = axis(view.picture_columns, view.shown_width);
    }
    const Axis down = nearest_two(view.rows, view.height);
    const Axis across = nearest_two(view.columns, view.width);

    const std::int64_t wide = round_to(3 * view.picture_columns, 16);
    const int workers = threads();
    auto* const memory = reinterpret_cast<float*>(arena.get(static_cast<std::size_t>(workers * wide) * sizeof(float)));
    for_items(view.height, workers, [&](std::int64_t row, int worker) {
        const auto at = [&](std::int64_t channel) { return x + channel * plane + row * view.width; };
        const bool shown = shows && row < view.shown_height;
        for (std::int64_t c = 0; c < 3; ++c) {
            const std::int64_t from = shown ? view.shown_width : 0;
            std::fill_n(at(c) + from, view.width - from, 0.0F);
        }
        if (shown) colours(view, rules, picture_down, picture_across, row, memory + worker * wide, x);
        logits_row(view, rules, view.logits, down, across, row, kernels, at(kLogits), at(kLogits + 1));
        if (view.before != nullptr) {
            logits_row(view, rules, view.before, down, across, row, kernels, at(kBefore), at(kBefore + 1));
        } else {
            std::fill_n(at(kBefore), view.width, 0.0F);
            std::fill_n(at(kBefore + 1), view.width, 0.0F);
        }
        for (const std::int64_t channel : {kClicks, kClicks + 1, kLatest}) std::fill_n(at(channel), view.width, 0.0F);
    });
    for (std::int64_t n = 0; n < view.clicks_count; ++n) {
        const float* click = view.clicks + 3 * n;
        const Slope rows = slope(static_cast<double>(click[0]), rules, view.height);
        const Slope columns = slope(static_cast<double>(click[1]), rules, view.width);
        put_click(view, rows, columns, x + (click[2] > 0.0F ? kClicks : kClicks + 1) * plane);
        if (n + 1 == view.clicks_count) put_click(view, rows, columns, x + kLatest * plane);
    }
}

bool put_back(const View& view, const ViewRules& rules, const float* change, float* out) {
    const Axis down = nearest_two(view.height, view.rows);
    const Axis across = nearest_two(view.width, view.columns);
    // Every row of the change as wide as the logits first: most rows of these lie between the same two.
    const std::int64_t stride = round_to(view.columns, 16);
    auto* const wide = reinterpret_cast<float*>(arena.get(static_cast<std::size_t>(view.height * stride) * sizeof(float)));
    for_items(view.height, threads(), [&](std::int64_t row, int) {
        const float* from = change + row * view.width;
        float* to = wide + row * stride;
        for (std::int64_t column = 0; column < view.columns; ++column) {
            const auto at = static_cast<std::size_t>(column);
            const float left = from[across.first[at]];
            to[column] = left + across.weight(column)[1] * (from[across.first[at] + across.count[at] - 1] - left);
        }
    });
    for_items(view.rows, threads(), [&](std::int64_t row, int) {
        const auto at = static_cast<std::size_t>(row);
        const float* above = wide + down.first[at] * stride;
        const float* below = above + (down.count[at] - 1) * stride;
        const float low = down.weight(row)[1];
        const float* logits = view.logits + row * view.columns;
        float* to = out + row * view.columns;
        for (std::int64_t column = 0; column < view.columns; ++column) {
            const float added = above[column] + low * (below[column] - above[column]);
            to[column] = std::min(std::max(logits[column], -rules.sure), rules.sure) + added;
        }
    });
    double sum = 0.0;
    for (std::int64_t i = 0; i < view.height * view.width; ++i) sum += static_cast<double>(change[i]);
    return std::isfinite(sum);
}

}  // namespace i2f
