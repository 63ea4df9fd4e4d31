// The interface to Python: one `Export` per kernel and dtype, read through ctypes (ov3fast/ops/cpu/__init__.py).
//
// No header of Python or PyTorch is included, so one build serves all their versions. A kernel is a template over the dtype that takes
// pointers (null for absent tensors), int64_t, bool and double, and the number of threads last. The argument conversion, and the signature
// that Python checks its own declaration against, are deduced from the template's parameters.
#pragma once

#include <cstdint>
#include <new>
#include <string>
#include <type_traits>

#include "simd.h"

#define OV3_VISIBLE __attribute__((visibility("default")))

namespace ov3 {

struct Export {
    const char* signature;  // types of the arguments, e.g. "float* int64_t double int64_t"
    void* function;         // takes them and returns 0, 1 if memory could not be allocated, or 2 where the kernel threw Refused
};

// What a kernel throws that can't take the values it was given, before it has written any.
struct Refused {};

template <class T>
inline const char* type_name();
template <> inline const char* type_name<void>() { return "void"; }
template <> inline const char* type_name<float>() { return "float"; }
template <> inline const char* type_name<double>() { return "double"; }
template <> inline const char* type_name<bf16>() { return "bf16"; }
template <> inline const char* type_name<int64_t>() { return "int64_t"; }
template <> inline const char* type_name<uint32_t>() { return "uint32_t"; }

// How an argument is passed: all integers as int64_t.
template <class T>
using Wire = std::conditional_t<std::is_integral_v<T>, int64_t, T>;

template <class T>
std::string wire_name() {
    if constexpr (std::is_pointer_v<T>) {
        return wire_name<std::remove_cv_t<std::remove_pointer_t<T>>>() + "*";
    } else {
        return type_name<T>();
    }
}

template <auto KERNEL>
struct Exported;

template <class... Arguments, void (*KERNEL)(Arguments...)>
struct Exported<KERNEL> {
    static int call(Wire<Arguments>... arguments) {
        try {
            KERNEL(static_cast<Arguments>(arguments)...);
            return 0;
        } catch (const std::bad_alloc&) {
            return 1;
        } catch (const Refused&) {
            return 2;
        }
    }

    static const Export* get() {
        static const std::string types = ((wire_name<Wire<Arguments>>() + " ") + ...);
        static const std::string signature = types.substr(0, types.size() - 1);
        static const Export result{signature.c_str(), reinterpret_cast<void*>(&call)};
        return &result;
    }
};

}  // namespace ov3

#define OV3_EXPORT_AS(name, suffix, ...) \
    extern "C" OV3_VISIBLE const ov3::Export* ov3_export_##name##_##suffix() { return ov3::Exported<&name<__VA_ARGS__>>::get(); }

// name<float> and name<bf16> as ov3_export_name_f32 and ov3_export_name_bf16.
#define OV3_EXPORT(name)           \
    OV3_EXPORT_AS(name, f32, float) \
    OV3_EXPORT_AS(name, bf16, ov3::bf16)

// For operators that support bfloat16 activations with parameters of either dtype: name<activation, parameter> as ov3_export_name_f32,
// ov3_export_name_bf16 and ov3_export_name_bf16_f32.
#define OV3_EXPORT_MIXED(name)                     \
    OV3_EXPORT_AS(name, f32, float, float)          \
    OV3_EXPORT_AS(name, bf16, ov3::bf16, ov3::bf16) \
    OV3_EXPORT_AS(name, bf16_f32, ov3::bf16, float)
