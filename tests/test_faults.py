"""The faults of faults.py still fit the code; running them takes minutes, and is done by hand."""

import ast

from faults import FAULTS, ROOT
import pytest


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_code(fault):
  ast.parse(fault.apply())
  for name in fault.tests:
    file, _, test = name.partition("::")
    functions = [
      node
      for node in ast.parse((ROOT / "tests" / file).read_text()).body
      if isinstance(node, ast.FunctionDef) and node.name == test.partition("[")[0]
    ]
    assert len(functions) == 1, name
    assert "slow" not in "".join(map(ast.dump, functions[0].decorator_list)), name


def test_names_are_different():
  assert len({fault.name for fault in FAULTS}) == len(FAULTS)
