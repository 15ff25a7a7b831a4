#include "dispatch.h"

#if defined(I2F_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace i2f {
namespace {

struct Found {
    std::vector<Path> single, pairs;
};

#ifdef I2F_X86
// The tile registers are a process's for the asking: 8 KB more to save with each of its threads that uses them.
bool may_use_tiles() {
#ifdef __linux__
    constexpr long kRequestState = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
#else
    return false;
#endif
}
#endif

Found probe() {
    Found found;
#ifdef I2F_X86
    // The built-ins also ask the operating system whether it saves the wide registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    found.single.push_back({&kAvx512, "avx512", avx512 ? "" : "this CPU or system lacks AVX-512 F, BW, DQ, VL"});
    found.single.push_back({&kAvx2, "avx2", avx2 ? "" : "this CPU or system lacks AVX2 or FMA"});
    const bool amx = bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
    found.pairs.push_back({&kAmx, "amx",
                           !amx               ? "this CPU or system lacks AMX BF16"
                           : may_use_tiles() ? ""
                                             : "the system does not let this process use AMX"});
    found.pairs.push_back({&kAvx512Bf16, "avx512", bf16 ? "" : "this CPU or system lacks AVX-512 BF16"});
#else
    found.single.push_back({nullptr, "avx512", "built for another processor family"});
    found.single.push_back({nullptr, "avx2", "built for another processor family"});
    found.pairs.push_back({nullptr, "amx", "built for another processor family"});
    found.pairs.push_back({nullptr, "avx512", "built for another processor family"});
#endif
    found.single.push_back({&kPortable, "portable", ""});
    found.single.push_back({&kScalar, "scalar", ""});
    found.pairs.push_back({&kPortableBf16, "portable", ""});
    return found;
}

}  // namespace

const std::vector<Path>& paths(Precision precision) {
    static const Found found = probe();
    return precision == Precision::float32 ? found.single : found.pairs;
}

bool bfloat16_pays() {
#ifdef I2F_X86
    const Kernels* const best = find_kernels("auto", Precision::bfloat16);
    return best == &kAmx || (best == &kAvx512Bf16 && !__builtin_cpu_is("intel"));
#else
    return false;
#endif
}

const Kernels* find_kernels(const std::string& name, Precision precision) {
    for (const Path& path : paths(precision)) {
        if (path.reason.empty() && (name == "auto" || name == path.name)) return path.kernels;
    }
    return nullptr;
}

}  // namespace i2f
