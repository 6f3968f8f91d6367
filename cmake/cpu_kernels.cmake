# Every csrc/cpu/<family>/*.cpp is compiled once per level, in that level's namespace and with its machine
# flags; csrc/cpu/common/dispatch.cpp picks one at run time. Sets PMF_CPU_OBJECTS.
file(GLOB PMF_CPU_KERNELS CONFIGURE_DEPENDS csrc/cpu/*/*.cpp)
list(FILTER PMF_CPU_KERNELS EXCLUDE REGEX "/(dispatch|cpu_introspection)\\.cpp$")

set(PMF_FLAGS_portable "")
set(PMF_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(PMF_FLAGS_avx512 -march=x86-64-v4)
set(PMF_FLAGS_avx512_bf16 -march=x86-64-v4 -mavx512bf16)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  set(PMF_CPU_LEVELS portable avx2 avx512 avx512_bf16)
else()
  set(PMF_CPU_LEVELS portable)
endif()

set(PMF_CPU_OBJECTS "")
foreach(level IN LISTS PMF_CPU_LEVELS)
  if(PMF_CPU_KERNELS)
    add_library(pmf_cpu_${level} OBJECT ${PMF_CPU_KERNELS})
    target_include_directories(pmf_cpu_${level} PRIVATE csrc/include csrc)
    target_compile_definitions(pmf_cpu_${level} PRIVATE PMF_LEVEL=${level})
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
