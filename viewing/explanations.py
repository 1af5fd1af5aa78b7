"""What the numbers of a report mean, in a line each; html, in the order of the report.

The definitions are in evaluation/: metric.py, occlusion.py, tracking.py, causes.py, linking.py.
"""

NUMBER_TEXTS = {
    "AP": "average precision, the mean over classes and IoU thresholds from 0.5 to 0.95",
    "AP50": "at IoU 0.5: the object is found and followed roughly",
    "AP75": "at IoU 0.75: the masks are good in most frames",
    "APs": "of small objects, up to 128&sup2; pixels on average",
    "APm": "of medium objects",
    "APl": "of large objects, from 256&sup2; pixels",
    "AR1": "average recall with one prediction per video and class",
    "AR10": "with ten predictions",
    "AR100": "with a hundred predictions",
    "ARs": "of small objects",
    "ARm": "of medium objects",
    "ARl": "of large objects",
}
GROUP_TEXTS = {
    "occlusion": "By occlusion level, as annotated",
    "gap": "By longest gap: frames in a row without the object, between two with it",
    "length": "By track length: the number of frames with the object",
}
IDENTITY_TEXTS = {
    "HOTA": "finding objects and keeping their identity, equally weighted: "
    "&radic;(DetA &middot; AssA)",
    "DetA": "masks that are found, of all predicted and actual ones",
    "DetRe": "actual masks that are found",
    "DetPr": "predicted masks that find something",
    "AssA": "how completely the masks of an object are in one track, and nothing else in it",
    "AssRe": "masks of an object that are in its track",
    "AssPr": "masks of a track that are of its object",
    "LocA": "mean IoU of the masks that are found",
    "MOTA": "1 minus missed masks, wrong masks and switches per actual mask; may be negative",
    "IDSW": "identity switches: an object continues in another track",
    "Frag": "fragmentations: an object is lost and found again",
    "IDF1": "masks with the right identity, of the mean of predicted and actual ones",
    "IDR": "actual masks with the right identity",
    "IDP": "predicted masks with the right identity",
}
CAUSE_TEXTS = {
    "wrong class": "IoU at least t, wrong class",
    "loose mask": "IoU from 0.1 to t, right class; most spoilt pixels are at inexact masks",
    "broken track": "IoU from 0.1 to t, right class; most spoilt pixels are in frames in which the "
    "object or the prediction is absent",
    "identity switch": "IoU from 0.1 to t, right class; most spoilt pixels are in frames in which "
    "the mask is on another object",
    "class and mask": "IoU from 0.1 to t, wrong class",
    "duplicate": "IoU at least t, right class; a better prediction has the object",
    "background": "IoU below 0.1 with every object",
    "missed": "(an object that no prediction finds, not even loosely)",
    "score order": "IoU from 0.1 to t, right class; a prediction with a lower score is better",
}
ORACLES = {
    "linking": ("best linking", "the masks of every frame linked anew, each to one object at most"),
    "bound": ("any linking, at most", "the best linking of each object, its class, nothing else"),
    "order": ("perfect order", "every true prediction scores higher than every false one"),
}
