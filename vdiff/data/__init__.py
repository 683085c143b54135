"""Images as integers, on the host: data sets, their files, and batches that are a function of the step."""

from vdiff.data import permutations as permutations
from vdiff.data.batches import batches as batches
from vdiff.data.fetch import fetch as fetch
from vdiff.data.records import open_records as open_records
from vdiff.data.records import write_records as write_records
from vdiff.data.rows import Rows as Rows
from vdiff.data.rows import from_source as from_source
from vdiff.data.sets import Dataset as Dataset
from vdiff.data.sets import check_images as check_images
from vdiff.data.sets import load as load
from vdiff.data.shards import open_shards as open_shards
from vdiff.data.shards import write_shards as write_shards
