"""The spatial-temporal scene graph (STSG): typed graph, text form, JSON form, geometric relations.

These names need only numpy. The recurrent graph transformer needs torch:
`from vot_kernels.models.graph import RecurrentGraphTransformer`.
"""

from vot_kernels.scene_graph.graph import (
    STSG,
    Box,
    CorefEdge,
    Event,
    Node,
    PackedGraph,
    Relation,
    SceneFrame,
    Tracklet,
    Vocabulary,
)
from vot_kernels.scene_graph.interval import Interval
from vot_kernels.scene_graph.relations import (
    GEOMETRIC_PREDICATES,
    RelationRules,
    Threshold,
    geometric_relations,
    with_geometric_relations,
)
from vot_kernels.scene_graph.serialization import STSGFormatError, from_dict, from_json, to_dict, to_json
from vot_kernels.scene_graph.summary import at_frames, summarised
from vot_kernels.scene_graph.text import ISSUE_KINDS, ParseIssue, from_text, to_text

__all__ = [
    "GEOMETRIC_PREDICATES",
    "ISSUE_KINDS",
    "STSG",
    "Box",
    "CorefEdge",
    "Event",
    "Interval",
    "Node",
    "PackedGraph",
    "ParseIssue",
    "Relation",
    "RelationRules",
    "STSGFormatError",
    "SceneFrame",
    "Threshold",
    "Tracklet",
    "Vocabulary",
    "at_frames",
    "from_dict",
    "from_json",
    "from_text",
    "geometric_relations",
    "summarised",
    "to_dict",
    "to_json",
    "to_text",
    "with_geometric_relations",
]
