// The bits of a float and back.
#pragma once
#include <cstring>

#include "contract.h"

namespace torsion {

TORSION_HD uint32_t to_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
TORSION_HD float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

TORSION_HD uint64_t to_bits(double x) {
  uint64_t u;
  memcpy(&u, &x, 8);
  return u;
}
TORSION_HD double from_bits(uint64_t u) {
  double x;
  memcpy(&x, &u, 8);
  return x;
}

}  // namespace torsion
