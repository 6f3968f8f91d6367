// Which line of a kernel an address of its code belongs to.
#pragma once

#include <string>

namespace pmf::emulator {

// "attention_tile.cuh:95 in load_rows" where addr2line is installed, else an offset in the library.
std::string describe_place(const void* address);

}  // namespace pmf::emulator
