// Errors of kernels, which become RuntimeErrors in Python.
//
// Kernels include few headers, also of the standard library: all of them together take less time to
// compile than <memory> and <string> in each would.
#pragma once

namespace fx {

// Throws std::runtime_error, whose message is made of the parts.
[[noreturn]] void fail(const char* first, const char* second = "", const char* third = "");

}  // namespace fx
