"""The nnInteractive protocol, version 2: 3D Slicer, MITK and napari connect without a plug-in of ours.

The address of the server in the viewer is `/nninteractive/BANK`, or `/nninteractive/BANK/CLASS` to draw one
class. Without a class the first interaction decides what is drawn.
"""

from fastapi import APIRouter, Depends

from vessa_server.api.authentication import require_key
from vessa_server.api.viewers.nninteractive.interactions import interactions_api
from vessa_server.api.viewers.nninteractive.leases import leases_api

nninteractive_api = APIRouter(prefix="/nninteractive/{bank}", dependencies=[Depends(require_key)])
nninteractive_api.include_router(leases_api)
nninteractive_api.include_router(interactions_api)
