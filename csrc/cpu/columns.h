// One row's columns moved by a list, the way that suits the list and the machine.
#pragma once
#include <cstdint>
#include <vector>

namespace torsion::cpu {

// to[c] = from[source[c]], or 0 where source[c] is -1. U: uint16_t, uint32_t or uint64_t.
template <class U>
class Columns {
 public:
  Columns(const int32_t* source, int64_t from_columns, int64_t to_columns);

  void operator()(const U* from, U* to) const { move_(*this, from, to); }

  // Sixteen columns of the wider side, eight of 64 bits: which of them have a partner, and how many came before.
  struct Group {
    uint32_t mask, before;
  };

  const int32_t* source;
  int64_t from_columns, to_columns;
  std::vector<Group> groups;

 private:
  bool ascends() const;
  bool counts() const;

  void (*move_)(const Columns&, const U*, U*);
};

}  // namespace torsion::cpu
