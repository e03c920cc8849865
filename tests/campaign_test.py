"""A little of the campaign of faults; `campaign.py` runs all of it."""

import campaign
import pytest


@pytest.fixture
def wrong():
  lines = []
  yield lines
  assert not lines


def test_every_file_of_a_row_store(tmp_path, wrong):
  found = campaign.of_row_store(tmp_path, 1, wrong)
  assert found["told"] > 90


def test_files_of_a_model_directory(tmp_path, wrong):
  found = campaign.of_model_directory(tmp_path, 1, wrong, every=4)
  assert found["told"] > 10


def test_a_disk_that_is_full_while_rows_are_written(tmp_path, wrong):
  assert campaign.full_disks_of_store(tmp_path, 5, wrong)["told"] >= 7


def test_a_disk_that_is_full_while_text_is_prepared(tmp_path, wrong):
  assert campaign.full_disks_of_preparing(tmp_path, [64], wrong)["told"] > 5


def test_a_disk_that_is_full_while_a_model_is_trained(tmp_path, wrong):
  found = campaign.full_disks_of_training(tmp_path, [1 << 12], [], wrong)
  assert found["told"] == 1
