// What the outline network sees of what was found, and its answer put back: the crop of inter2former/refinement.py,
// which says what it is and why; `look` and `drawn` there are the twins.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace i2f {

// Channels of the network, as in inter2former/nn/outline.py.
constexpr std::int64_t kViewChannels = 10;

// Numbers that Python and C++ have to agree on, see refinement.py and images.py.
struct ViewRules {
    float sure;   // logits end here
    float scale;  // of logits
    double blob;  // sigma of a click, in crop pixels
    double far;   // of these a click reaches
    float mean[3], deviation[3];
};

struct View {
    const float* logits;  // [rows][columns]
    const float* before;  // as logits, or null
    std::int64_t rows, columns;
    const std::uint8_t* picture;  // [picture_rows][picture_columns][3], rows `picture_stride` apart
    std::int64_t picture_rows, picture_columns;
    std::ptrdiff_t picture_stride;
    std::int64_t height, width;              // of the crop
    std::int64_t shown_height, shown_width;  // of its part that shows the picture
    const float* clicks;                     // [clicks_count][3]: y, x in crop pixels, positive
    std::int64_t clicks_count;
};

// x [kViewChannels][height][width]. Throws std::bad_alloc.
void look(const View& view, const ViewRules& rules, const Kernels& kernels, float* x);

// out [rows][columns] = the logits and the change, [height][width], in their pixels. Returns whether every change is
// finite. Throws std::bad_alloc.
bool put_back(const View& view, const ViewRules& rules, const float* change, float* out);

}  // namespace i2f
