import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest

from llmc.errors import GraphError
from llmc.ir import dtypes
from llmc.ir.dtypes import DTYPES, dtype, from_numpy

NAMES = [
    *("f64", "f32", "f16", "bf16", "f8e4m3fn", "f8e5m2", "f8e4m3fnuz", "f8e5m2fnuz"),
    *("f8e8m0", "f4e2m1", "i2", "i4", "i8", "i16", "i32", "i64"),
    *("u2", "u4", "u8", "u16", "u32", "u64", "bool"),
]


def test_the_table_is_complete():
    assert list(DTYPES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_numpy_go_both_ways(name):
    found = dtype(name)
    assert found is getattr(dtypes, "bool_" if name == "bool" else name)
    assert from_numpy(found.numpy) is found
    assert str(found) == name
    assert found.numpy.itemsize == max(8, found.bits) // 8
    assert dtype(found) is found
    assert copy.deepcopy(found) is found
    assert pickle.loads(pickle.dumps(found)) is found


def test_kinds():
    assert dtypes.bf16.is_float and not dtypes.bf16.is_integer
    assert dtypes.u4.is_integer and not dtypes.u4.is_float
    assert not dtypes.bool_.is_integer and not dtypes.bool_.is_float


@pytest.mark.parametrize("name", ["float32", "", "F32"])
def test_unknown_names(name):
    with pytest.raises(GraphError, match="unknown dtype"):
        dtype(name)


@pytest.mark.parametrize("numpy_type", [np.complex64, np.dtype("U3"), np.dtype("O")])
def test_unknown_numpy_dtypes(numpy_type):
    with pytest.raises(GraphError):
        from_numpy(np.dtype(numpy_type))


def test_foreign_byte_order_is_refused():
    with pytest.raises(GraphError):
        from_numpy(np.dtype(np.float32).newbyteorder())


def test_importing_the_table_loads_no_numpy():
    code = "import sys, llmc.ir.dtypes; print('numpy' in sys.modules or 'ml_dtypes' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout.strip() == "False", printed.stderr
