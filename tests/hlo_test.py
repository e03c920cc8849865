"""The reader of HLO, against programs whose exchanges are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from basemt_jax.compilation import hlo

MESH = {"data": 2, "expert": 2, "model": 2}
TURNS = 5


@functools.cache
def program():
  """Each kind of exchange once, two all-to-alls in a loop; as HLO."""
  mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), tuple(MESH))

  def body(c, _):
    c = lax.all_to_all(c, "expert", 0, 1, tiled=True)
    c = lax.all_to_all(c, "expert", 1, 0, tiled=True) * 1.5
    return c, None

  def function(x):
    x, _ = lax.scan(body, x, None, length=TURNS)
    return (
      lax.psum(x, ("data", "expert")),
      lax.all_gather(x, "model", tiled=True),
      lax.psum_scatter(x.astype(jnp.bfloat16), "expert", tiled=True),
      lax.ppermute(x, "data", [(0, 1), (1, 0)]),
    )

  split = P(("data", "expert"))
  step = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=split,
    out_specs=(P(), split, P(("data", "expert")), split),
    check_vma=False,
  )
  x = jax.ShapeDtypeStruct(
    (4 * 64, 128), jnp.float32, sharding=NamedSharding(mesh, split)
  )
  return jax.jit(step).lower(x).compile().as_text()


def test_exchanges_of_a_program_written_by_hand():
  found = {}
  for c in hlo.collectives(program(), 8):
    axes, is_whole = hlo.axes_of(c.groups, MESH)
    assert is_whole
    count, size, sent = found.get((c.kind, axes), (0, 0, 0))
    found[c.kind, axes] = (
      count + c.count,
      size + c.count * c.bytes,
      sent + c.count * c.sent_bytes,
    )
  part = 64 * 128 * 4  # bytes a device holds
  scatter = found.pop(("reduce-scatter", ("expert",)), None)
  assert found == {
    # Of what it puts in, a device keeps the half that is its own.
    ("all-to-all", ("expert",)): (
      2 * TURNS,
      2 * TURNS * part,
      2 * TURNS * part / 2,
    ),
    ("all-reduce", ("data", "expert")): (1, part, 2 * part * 3 / 4),
    ("all-gather", ("model",)): (1, part, part),
    ("collective-permute", ("data",)): (1, part, part),
  }
  # The backend may reduce in float32.
  assert scatter in ((1, part / 2, part / 4), (1, part, part / 2))


@pytest.mark.parametrize(
  "written, expected",
  [
    ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("source_target_pairs={{0,2},{2,0}}", [[0, 2], [2, 0]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=4,'b'=1] {'a','b'}", [[0, 1, 2, 3]]),
    # Devices 0 2 1 3 in a 2 x 2 mesh.
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}",
      [[0, 2], [1, 3]],
    ),
    (
      "replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}",
      [[3, 2], [1, 0]],
    ),
    # An axis of 4 as 2 x 2: its first part, its second part.
    ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
  ],
)
def test_groups_in_all_forms_that_xla_writes(written, expected):
  rest = f"%x), channel_id=1, {written}, use_global_device_ids=true"
  np.testing.assert_array_equal(hlo._groups(rest, 4), expected)


def test_groups_of_an_unknown_form_are_refused():
  with pytest.raises(ValueError, match=r"unknown form.*replica_groups=<new>"):
    hlo._groups("%x), replica_groups=<new>", 4)


def test_axes_are_those_along_which_groups_differ():
  places = np.arange(8).reshape(2, 2, 2)
  assert hlo.axes_of(places.reshape(1, 8), MESH) == (tuple(MESH), True)
  along_model = places.reshape(4, 2)
  assert hlo.axes_of(along_model, MESH) == (("model",), True)
  # A diagonal has devices of two axes, but not all.
  diagonal = np.array([[0, 6], [2, 4], [1, 7], [3, 5]])
  assert hlo.axes_of(diagonal, MESH) == (("data", "expert"), False)


@pytest.mark.parametrize(
  "array, expected",
  [
    ("f32[]", 4),
    ("bf16[2,128]", 512),
    ("pred[7]", 7),
    ("s4[10]", 5),
    ("f8e4m3fn[3,3]", 9),
    ("f32[0,5]", 0),
  ],
)
def test_bytes_of_arrays(array, expected):
  assert hlo.array_bytes(array) == expected


def test_memory_traffic_is_what_goes_in_and_out_of_fusions():
  x = jax.ShapeDtypeStruct((1000,), jnp.float32)

  def once(x):
    return jnp.sin(x) * 2 + 1

  def in_a_loop(x):
    return lax.fori_loop(0, 7, lambda _, y: jnp.sin(y * 2) + x, x)

  text = jax.jit(once).lower(x).compile().as_text()
  assert hlo.memory_bytes(text) == 2 * 4000
  text = jax.jit(in_a_loop).lower(x).compile().as_text()
  # Every turn reads two arrays and writes one; copies and counters aside.
  assert 7 * 3 * 4000 <= hlo.memory_bytes(text) <= 7 * 4 * 4000 + 100_000


SCHEDULED = """\
HloModule scheduled, is_scheduled=true

%wrapped (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  ROOT %inner = f32[4,8]{1,0} all-to-all(%a), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (p0: f32[4,8], p1: f32[8,8]) -> (f32[4,8], f32[4,8]) {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[8,8]{1,0} parameter(1)
  %all-to-all-start.1 = ((f32[4,8]{1,0}), f32[4,8]{1,0}) all-to-all-start(%p0), replica_groups={{0,1}}, dimensions={0}, metadata={op_name="exchange"}
  %gemm = f32[4,8]{1,0} custom-call(%p0, %p1), custom_call_target="__cublas$gemm", metadata={op_name="product"}
  %name = f32[4,8]{1,0} bitcast(%gemm)
  %start.2 = ((f32[4,8]{1,0}), f32[4,8]{1,0}) async-start(%name), calls=%wrapped
  %all-to-all-done.1 = f32[4,8]{1,0} all-to-all-done(%all-to-all-start.1)
  %done.2 = f32[4,8]{1,0} async-done(%start.2)
  ROOT %all = (f32[4,8]{1,0}, f32[4,8]{1,0}) tuple(%all-to-all-done.1, %done.2)
}
"""  # noqa: E501


def test_what_a_schedule_has_beside_an_exchange():
  first, second = hlo.asynchronous(SCHEDULED)
  assert (first.kind, first.op_name) == ("all-to-all", "exchange")
  assert first.meanwhile == (
    ("custom-call __cublas$gemm", "product"),
    ("async-start", ""),
  )
  assert second.kind == "all-to-all" and not second.meanwhile
  assert len(hlo.collectives(SCHEDULED, 2)) == 2
  assert not hlo.asynchronous(program())  # On a CPU they are waited for.


TPU_COPIES = """\
HloModule copies

ENTRY %main (p0: f32[8,128]) -> f32[2,128] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %slice-start = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(2,128)S(1)}, s32[]{:T(128)}) slice-start(%p0), slice={[0:2], [0:128]}
  %slice-done = f32[2,128]{1,0:T(2,128)S(1)} slice-done(%slice-start)
  ROOT %fusion = f32[2,128]{1,0:T(2,128)} fusion(%slice-done), kind=kLoop, calls=%f, backend_config={"window_config":{"estimated_cycles":"77"}}
}
"""  # noqa: E501


def test_what_stays_on_a_tpu_is_no_memory_traffic():
  text = TPU_COPIES.replace(
    "ENTRY",
    "%f (a: f32[2,128]) -> f32[2,128] {\n"
    "  ROOT %a = f32[2,128]{1,0} parameter(0)\n}\n\nENTRY",
  )
  # Two rows into the chip's own memory, two rows out of it.
  assert hlo.memory_bytes(text) == 2 * (2 * 128 * 4)
  assert hlo.estimated_cycles(text) == 77


def test_turns_of_loops_that_xla_does_not_tell():
  text = program()
  told = '"known_trip_count":{"n":"5"}'
  assert told in text
  untold = text.replace(told, '"other":{}')
  counts = [c.count for c in hlo.collectives(untold, 8)]
  assert sorted(counts) == sorted(c.count for c in hlo.collectives(text, 8))
  # With a limit that is no constant nothing is guessed.
  unknown = untold.replace("s32[] constant(5)", "s32[] parameter(0)")
  with pytest.raises(ValueError, match="number of turns is not known"):
    hlo.collectives(unknown, 8)


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.collectives("nothing", 8)
