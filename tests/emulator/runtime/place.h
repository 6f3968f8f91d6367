// Finds the source line of an address in a kernel's code.
#pragma once

#include <string>

namespace pmf::emulator {

// "attention_tile.cuh:95 in load_rows" if addr2line is installed, else an offset in the library.
std::string describe_place(const void* address);

}  // namespace pmf::emulator
