"""What somebody sends who means ill: each of these once got through."""

import numpy as np

from tests.app.client import Client
from tests.app.served import served
from tests.scans.ct_fixtures import patient

META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nCompressedData = False\n"
    "TransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\nElementSpacing = 1.5 1.5 3\nDimSize = 44 36 12\n"
    "ElementType = MET_SHORT\n"
)


# ---- files that mean two things --------------------------------------------------------------------------------------


def test_no_file_of_the_server_is_opened_by_a_header(tmp_path):
    """ITK passes over a field in small letters and opens the file that the next one names."""
    other = tmp_path / "other.raw"
    (patient() + np.int16(7)).tofile(other)
    head = f"{META}elementdatafile = LOCAL\nElementDataFile = {other}\n".encode()
    with served(tmp_path) as (room, port):
        client = Client(port)
        client.open([(".mha", head + patient().tobytes())])
        found = np.frombuffer(client.raw("GET", "/api/slice?axis=0&index=0")[2], np.int16)
        assert not np.array_equal(found, patient()[0].ravel() + 7)


def test_a_header_with_a_giant_number_of_axes_ends_no_server(tmp_path):
    with served(tmp_path) as (room, port):
        client = Client(port)
        head = META.replace("NDims = 3", "NDims = 1000000\nndims = 3") + "ElementDataFile = LOCAL\n"
        assert "states a field of its header twice" in client.open([(".mha", head.encode() + patient().tobytes())])[1]
        assert Client(port).example()
