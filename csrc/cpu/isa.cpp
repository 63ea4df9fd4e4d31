// Reports which instruction sets this processor supports. Compiled for the baseline; the rest of the library is built once per instruction set.

#include "tiles.h"

extern "C" __attribute__((visibility("default"))) const char* ov3_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#if OV3_HAS_TILES
    if (bf16 && ov3::HardwareTiles::permitted()) return "amx_bf16";
#endif
    if (bf16) return "avx512_bf16";
    if (avx512) return "avx512";
    if (avx2) return "avx2";
#endif
    return "portable";
}
