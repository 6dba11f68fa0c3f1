#pragma once

#include <string>

namespace urlvr::cpu {

// Use the named instruction set from now on (tests compare them); "" changes nothing. Returns the one in use.
std::string use_instruction_set(std::string name);

}  // namespace urlvr::cpu
