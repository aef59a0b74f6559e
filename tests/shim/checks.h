// What the programs of this folder have in common: a check throws when it fails; each prints one line.
#pragma once
#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

#define REQUIRE(condition, ...) \
  if (!(condition)) throw std::runtime_error(std::string(#condition) + " " + torsion::test::describe(__VA_ARGS__))

namespace torsion::test {

inline std::string describe() { return {}; }
inline std::string describe(const std::string& s) { return s; }
inline std::string describe(double x) { return std::to_string(x); }

using Checks = std::map<std::string, void (*)()>;

inline int run_check(const Checks& checks, const std::string& name) {
  const auto check = checks.find(name);
  try {
    if (check == checks.end()) throw std::runtime_error("no such check");
    check->second();
    std::printf("ok %s\n", name.c_str());
    return 0;
  } catch (const std::exception& error) {
    std::printf("FAILED %s: %s\n", name.c_str(), error.what());
    return 1;
  }
}

// Runs those named on the command line, or all; returns the number of failures.
inline int run_checks(const Checks& checks, int count, char** names) {
  int failures = 0;
  if (count == 1)
    for (const auto& check : checks) failures += run_check(checks, check.first);
  for (int i = 1; i < count; ++i) failures += run_check(checks, names[i]);
  return failures;
}

}  // namespace torsion::test
