"""Reports on compiled steps, as people read them."""

import pod_reports
import pytest

from basemt_jax.inspection import compile_report


@pytest.mark.parametrize(
  ("used", "fits", "said"),
  [
    (0.5, True, "of 16.00: fits |"),
    (0.91, True, "fits tightly, 91% used; leave 10%"),
    (1.2, False, "DOES NOT FIT"),
  ],
)
def test_a_step_that_leaves_no_room_is_said_to(used, fits, said):
  available = 16 * 2**30
  report = pod_reports.with_memory(
    total=used * available, available=available, fits=fits
  )
  assert said in compile_report.markdown(report)
