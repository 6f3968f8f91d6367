# Every csrc/cpu/<family>/*.cpp is compiled once per level, in that level's namespace and with its machine
# flags; csrc/cpu/common/dispatch.cpp picks one at run time. Sets PMF_CPU_OBJECTS.
file(GLOB PMF_CPU_KERNELS CONFIGURE_DEPENDS csrc/cpu/*/*.cpp)
list(FILTER PMF_CPU_KERNELS EXCLUDE REGEX "/(dispatch|cpu_introspection)\\.cpp$")

# Those with products of bf16, all that level amx_bf16 computes in a way of its own.
set(PMF_AMX_KERNELS csrc/cpu/attention/attention_forward.cpp csrc/cpu/attention/attention_backward.cpp)

# On x86-64 each level names its -march, so that one in CXXFLAGS does not reach it.
set(PMF_FLAGS_portable "")
# Processors with AVX2 that do not know prefetchw (-mprfchw) skip it.
set(PMF_FLAGS_avx2 -march=x86-64 -mavx2 -mfma -mf16c -mprfchw)
set(PMF_FLAGS_avx512 -march=x86-64-v4 -mprfchw)
set(PMF_FLAGS_avx512_bf16 ${PMF_FLAGS_avx512} -mavx512bf16)
set(PMF_FLAGS_amx_bf16 ${PMF_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16)

set(PMF_AMX 0)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(PMF_CPU_LEVELS portable avx2 avx512 avx512_bf16)
  set(PMF_FLAGS_portable -march=x86-64 -O2) # only for processors before 2013, and a third faster to compile
  # GCC 11, clang 12, and an assembler as new.
  include(CheckCXXSourceCompiles)
  set(CMAKE_REQUIRED_FLAGS "-mamx-tile -mamx-bf16")
  check_cxx_source_compiles("int main() { __asm__ volatile(\"tdpbf16ps %tmm2, %tmm1, %tmm0\"); }" PMF_COMPILES_AMX)
  unset(CMAKE_REQUIRED_FLAGS)
  if(PMF_COMPILES_AMX)
    set(PMF_AMX 1)
    list(APPEND PMF_CPU_LEVELS amx_bf16)
  endif()
else()
  set(PMF_CPU_LEVELS portable)
endif()

set(PMF_CPU_OBJECTS "")
foreach(level IN LISTS PMF_CPU_LEVELS)
  if(level STREQUAL amx_bf16)
    set(kernels ${PMF_AMX_KERNELS})
  else()
    set(kernels ${PMF_CPU_KERNELS})
  endif()
  if(kernels)
    add_library(pmf_cpu_${level} OBJECT ${kernels})
    target_include_directories(pmf_cpu_${level} PRIVATE csrc/include csrc)
    target_compile_definitions(pmf_cpu_${level} PRIVATE PMF_LEVEL=${level} PMF_AMX=${PMF_AMX})
    # No exceptions, run-time types or thread-safe statics: a kernel is arithmetic on pointers, and such
    # code would come from inline functions that the linker may take from another level's objects.
    target_compile_options(
      pmf_cpu_${level} PRIVATE ${PMF_FLAGS_${level}} -fno-math-errno -ffp-contract=fast -fno-exceptions -fno-rtti
                               -fno-threadsafe-statics -Wall -Wextra -Wno-unused-parameter -Wno-psabi
                               # GCC 12 takes _mm512_undefined_ps() in its own headers for a mistake (bug 105593).
                               -Wno-uninitialized -Wno-maybe-uninitialized)
    list(APPEND PMF_CPU_OBJECTS $<TARGET_OBJECTS:pmf_cpu_${level}>)
  endif()
endforeach()
