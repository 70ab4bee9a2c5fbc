// Argument checks: a failed one throws with a message that names the argument, its value, the rule and the remedy.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace resnet_fused {

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace resnet_fused

// Throws std::invalid_argument with the further arguments as text unless the condition holds; they are evaluated only
// then.
#define RF_CHECK(CONDITION, ...) \
  if (!(CONDITION)) throw std::invalid_argument(resnet_fused::message(__VA_ARGS__))
