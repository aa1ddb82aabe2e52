# SPDX-License-Identifier: Apache-2.0
"""The studies: the paper's Tables 1, 2, 6, 8, 9 and Figure 5, and questions that it leaves open (`_ours`).

Schedules of stage 3 are those of `LL/LL/xxxxxx/LL` (Table 2) or `LL/LL/xxxxxx/LS` (Tables 6 and 9). Numbers are the
paper's, top-1 in per cent. Figure 5 prints no numbers; the text states three of its orders and one difference.
"""

from collections.abc import Sequence

from sola_vision.schedule import parse_bridges, parse_schedule

from .definition import Arm, Claim, Size, Study

# fmt: off
_TABLE_1 = (  # schedule, top-1, GMACs at 512 x 512, millions of parameters
    ("LLLLLL", 83.3, 3.1, 3.3),
    ("SSSSSS", 81.5, 5.3, 2.9),
    ("SLLLLL", 83.7, 3.4, 3.2),
    ("LLLSLL", 84.0, 3.4, 3.2),
    ("LLLLLS", 83.9, 3.4, 3.2),
)
_TABLE_8: tuple[tuple[Size, float, float, float], ...] = (  # size, mIoU without and with bridges, GMACs at 512 x 512
    ("tiny",  44.7, 45.0, 10.9),
    ("small", 48.1, 48.6, 27.2),
    ("base",  50.5, 51.4, 89.0),
)
_TABLE_2 = (
    ("LLLLLL", 87.53), ("SSSSSS", 88.02),
    ("SLLLLL", 87.62), ("LLLLLS", 87.77),
    ("SSLLLL", 88.06), ("LLLLSS", 88.18),
    ("SSSLLL", 87.92), ("LLLSSS", 88.02),
    ("LLSLLS", 88.53), ("LSLSLS", 88.26),
)
_SOLA, _ALTERNATING, _STACKED = "LL/LL/LLSLLS/LS", "LL/LL/LSLSLS/LS", "LL/LL/LLLSSS/LS"
_LINEAR, _BRIDGES             = "LL/LL/LLLLLL/LL", "1.2>3.3 2.2>3.6 3.2>4.2"
_SOLA_BASE, _BASE_BRIDGES = "LL/LL/LLLSLLSLLSLLSLLS/LS", "1.2>3.4 1.2>3.7 2.2>3.10 2.2>3.13 3.2>3.16 3.2>4.2"
# fmt: on


def _table1() -> Study:
    variants = (("", ""), ("same_ffn", ", same FFN"))
    arms = [
        Arm(
            name=schedule + text,
            schedule=schedule,
            change=change if "L" in schedule else "",  # SSSSSS is the same network in both, and so one run
            paper=accuracy,
            paper_gmacs=gmacs,
            paper_params=params,
        )
        for change, text in variants
        for schedule, accuracy, gmacs, params in _TABLE_1
    ]
    claims = []
    for _, t in variants:
        claims += [
            _claim(f"pure linear > pure softmax{t}", "LLLLLL" + t, "SSSSSS" + t, "Table 1 and section 4.1"),
            Claim(
                text=f"one softmax layer in the middle or last > first{t}",
                better=("LLLSLL" + t, "LLLLLS" + t),
                worse=("SLLLLL" + t,),
                source="Table 1 and section 4.1",
            ),
            _claim(f"one softmax layer in the middle > none{t}", "LLLSLL" + t, "LLLLLL" + t, "Table 1"),
            _claim(f"one softmax layer first > none{t}", "SLLLLL" + t, "LLLLLL" + t, "Table 1"),
        ]
    return Study(
        name="table1",
        title="Table 1: six layers, linear and softmax",
        varies="which of the six layers are softmax, and whether all layers have the same kind of feed-forward network",
        fixed="an isotropic stack of six layers",
        network="isotropic",
        arms=tuple(arms),
        claims=tuple(claims),
        cost_size=512,
        notes=(
            'The caption says "with identical FFN modules", while section 4.4 gives linear layers a channel mix and '
            "softmax layers an MLP with a depth-wise convolution. Both variants are run: each layer with its own, and "
            '("same FFN") every layer with the softmax layer\'s. The paper prints one number for each stack.',
        ),
    )


def _fig5() -> Study:
    arms: list[Arm] = []
    known = {schedule: accuracy for schedule, accuracy, *_ in _TABLE_1}
    for depth in range(1, 7):
        for schedule in ("L" * depth, "L" * (depth - 1) + "S"):
            arms.append(Arm(name=schedule, schedule=schedule, paper=known.get(schedule)))
    claims = [
        _claim("K = 1: linear > softmax", "L", "S", "section 4.1"),
        _claim("K = 2: LL > LS", "LL", "LS", "section 4.1"),
        _claim("K = 3: LLS > LLL (by 1.3 points in the paper)", "LLS", "LLL", "section 4.1"),
        _claim("K = 6: LLLLLS > LLLLLL", "LLLLLS", "LLLLLL", "Table 1"),
    ]
    return Study(
        name="fig5",
        title="Figure 5: depth, pure linear against one softmax layer at the end",
        varies="the number K of layers, and whether the last one is softmax",
        fixed="isotropic stacks of the width of Table 1",
        network="isotropic",
        arms=tuple(arms),
        claims=tuple(claims),
        cost_size=512,
        over="depth",
        notes=("The figure prints no numbers; those given here for K = 6 are from Table 1.",),
    )


def _table2() -> Study:
    source = "Table 2 and section 4.3"
    return Study(
        name="table2",
        title="Table 2: schedules of stage 3",
        varies="the six layers of stage 3",
        fixed="stages 1, 2 and 4 linear: LL/LL/xxxxxx/LL",
        network="hierarchical",
        epochs=200,
        arms=tuple(Arm(name=stage, schedule=f"LL/LL/{stage}/LL", paper=paper) for stage, paper in _TABLE_2),
        claims=(
            _claim("LLSLLS > pure linear", "LLSLLS", "LLLLLL", source),
            _claim("LLSLLS > pure softmax", "LLSLLS", "SSSSSS", source),
            _claim("equal budget: LLSLLS > SSLLLL", "LLSLLS", "SSLLLL", source),
            _claim("two softmax layers are enough: LLSLLS > LSLSLS", "LLSLLS", "LSLSLS", source),
            _claim("pure softmax > pure linear (the reverse of Table 1)", "SSSSSS", "LLLLLL", "Table 2"),
            Claim(
                text="softmax late > early, one to three layers",
                better=("LLLLLS", "LLLLSS", "LLLSSS"),
                worse=("SLLLLL", "SSLLLL", "SSSLLL"),
                source="Table 2",
            ),
        ),
    )


def _table6() -> Study:
    source = "Table 6 and section 5.4"
    return Study(
        name="table6",
        title="Table 6: the backbone's schedule and the Hidden State Bridge",
        varies="stage 3, and bridges",
        fixed="LL/LL/xxxxxx/LS",
        network="hierarchical",
        data="ImageNet-1K",
        arms=(
            Arm(name="Alternating", schedule=_ALTERNATING, paper=79.12),
            Arm(name="Stacked-Last", schedule=_STACKED, paper=79.28),
            Arm(name="SoLA", schedule=_SOLA, paper=79.68),
            Arm(name="SoLA + bridges", schedule=_SOLA, bridges=_BRIDGES, paper=79.83),
        ),
        claims=(
            _claim("SoLA > Alternating", "SoLA", "Alternating", source),
            _claim("SoLA > Stacked-Last", "SoLA", "Stacked-Last", source),
            _claim("bridges > none", "SoLA + bridges", "SoLA", source),
        ),
    )


def _table9() -> Study:
    source = "Table 9 and section 8.2"
    return Study(
        name="table9",
        title="Table 9: the pure linear variant",
        varies="the schedules of stages 3 and 4",
        fixed="stages 1 and 2 linear",
        network="hierarchical",
        data="ImageNet-1K",
        arms=(
            Arm(name="Pure Linear", schedule=_LINEAR, paper=78.56),
            Arm(name="Alternating", schedule=_ALTERNATING, paper=79.12),
            Arm(name="Stacked-Last", schedule=_STACKED, paper=79.28),
            Arm(name="SoLA", schedule=_SOLA, paper=79.68),
        ),
        claims=(
            _claim("SoLA > Pure Linear", "SoLA", "Pure Linear", source),
            _claim("Alternating > Pure Linear", "Alternating", "Pure Linear", source),
            _claim("Stacked-Last > Alternating", "Stacked-Last", "Alternating", source),
        ),
    )


def _table8() -> Study:
    arms: list[Arm] = []
    claims = []
    for size, without, with_bridges, gmacs in _TABLE_8:
        schedule, bridges = (_SOLA_BASE, _BASE_BRIDGES) if size == "base" else (_SOLA, _BRIDGES)
        name = "SoLA" if size == "tiny" else f"SoLA-{size[0].upper()}"
        for text, some, paper in ((name, "", without), (f"{name} + bridges", bridges, with_bridges)):
            arms.append(Arm(name=text, schedule=schedule, bridges=some, paper=paper, paper_gmacs=gmacs, size=size))
        where = "" if size == "tiny" else f", {name}"
        claims.append(_claim(f"bridges > none{where}", f"{name} + bridges", name, "Table 8 and section 8.1"))
    return Study(
        name="table8",
        title="Table 8: bridges on semantic segmentation",
        varies="bridges",
        fixed="schedule, UPerNet, recipe",
        network="hierarchical",
        data="ADE20K",
        cost_size=512,
        task="segmentation",
        metric="miou",
        arms=tuple(arms),
        claims=tuple(claims),
        notes=(
            "The paper starts from ImageNet weights and does not say whether its row without bridges comes from a "
            "classifier without them. Scale paper uses the checkpoint that fits; one with bridges also serves the row "
            "without, with its bridges dropped. Smaller scales train from scratch unless weights are given.",
            "The paper has three sizes: T 44.7 and 45.0 with bridges, S 48.1 and 48.6, B 50.5 and 51.4. Smaller scales "
            "have only T's schedule.",
        ),
    )


def _token_shift() -> Study:
    return _ours(
        name="token_shift",
        title="Token shift on and off",
        varies="whether linear layers blend each token with a neighbour before their projections",
        fixed="everything else",
        arms=(
            Arm(name="SoLA", schedule=_SOLA),
            Arm(name="SoLA, no shift", schedule=_SOLA, token_shift=False),
            Arm(name="linear", schedule=_LINEAR),
            Arm(name="linear, no shift", schedule=_LINEAR, token_shift=False),
        ),
        claims=(
            _claim("shift > none in SoLA", "SoLA", "SoLA, no shift"),
            _claim("shift > none in the pure linear network", "linear", "linear, no shift"),
            _claim("without shift: SoLA > pure linear", "SoLA, no shift", "linear, no shift"),
        ),
        notes=("The paper does not mention the shift. Vision-RWKV's layers begin with it: 71.5 without, 75.1 with.",),
    )


def _decay_init() -> Study:
    return _ours(
        name="decay_init",
        title="The initial decay",
        varies="the initial w of eq. 9, in particular its sign; it is learned afterwards",
        fixed="the pure linear network, in which nothing else has a long range",
        arms=(
            Arm(name="1 to 64", schedule=_LINEAR),
            Arm(name="Vision-RWKV", schedule=_LINEAR, change="decay_vision_rwkv"),
            Arm(name="zero", schedule=_LINEAR, change="decay_zero"),
            Arm(name="-1 to -64", schedule=_LINEAR, change="decay_negative"),
        ),
        claims=(
            _claim("positive > negative", "1 to 64", "-1 to -64"),
            _claim("positive > Vision-RWKV's mixed signs", "1 to 64", "Vision-RWKV"),
            _claim("positive > zero", "1 to 64", "zero"),
        ),
        notes=("The paper's analysis needs w > 0; Vision-RWKV starts at -5 to 3; w < 0 grows with distance.",),
    )


def _raster() -> Study:
    return _ours(
        name="raster",
        title="The order of pixels in the sequence",
        varies="whether the operator reads the tokens row by row, column by column, or alternately from layer to layer",
        fixed="everything else; softmax layers do not depend on the order",
        arms=(
            Arm(name="rows", schedule=_LINEAR),
            Arm(name="columns", schedule=_LINEAR, change="order_columns"),
            Arm(name="in turn", schedule=_LINEAR, change="order_in_turn"),
            Arm(name="SoLA, rows", schedule=_SOLA),
            Arm(name="SoLA, in turn", schedule=_SOLA, change="order_in_turn"),
        ),
        claims=(
            _claim("in turn > rows in the pure linear network", "in turn", "rows"),
            _claim("in turn > rows in SoLA", "SoLA, in turn", "SoLA, rows"),
            _claim("rows > columns", "rows", "columns"),
        ),
    )


def _bridge_source() -> Study:
    return _ours(
        name="bridge_source",
        title="The source of a bridge",
        varies="where bridges start, and whether they carry the state's read-out or the layer's output",
        fixed="LL/LL/LLSLLS/LS",
        arms=(
            Arm(name="none", schedule=_SOLA),
            Arm(name="Table 7", schedule=_SOLA, bridges=_BRIDGES),
            Arm(name="Table 7, outputs", schedule=_SOLA, bridges=_BRIDGES, change="bridge_outputs"),
            Arm(name="stage 1", schedule=_SOLA, bridges="1.2>3.3 1.2>3.6 1.2>4.2"),
            Arm(name="stage 2", schedule=_SOLA, bridges="2.2>3.3 2.2>3.6 2.2>4.2"),
        ),
        claims=(
            _claim("Table 7's bridges > none", "Table 7", "none"),
            _claim("the state's read-out > the layer's output", "Table 7", "Table 7, outputs"),
            _claim("from stage 1 > from stage 2", "stage 1", "stage 2"),
        ),
    )


def _ours(
    *,
    name: str,
    title: str,
    varies: str,
    fixed: str,
    arms: tuple[Arm, ...],
    claims: tuple[Claim, ...],
    notes: tuple[str, ...] = (),
) -> Study:
    return Study(
        name=name,
        title=title,
        varies=varies,
        fixed=fixed,
        network="hierarchical",
        arms=arms,
        claims=claims,
        data="",
        notes=(*notes, "Not in the paper: an additional question."),
    )


def _claim(text: str, better: str, worse: str, source: str = "") -> Claim:
    return Claim(text=text, better=(better,), worse=(worse,), source=source)


def custom(schedules: Sequence[str]) -> Study:
    """Return a study of networks of equal depths, each compared with the first.

    schedules: each optionally followed by bridges, as `sola search` prints its result: "LL/LL/LLSLLS/LS" or
    "LL/LL/LLSLLS/LS 1.2>3.3 2.2>3.6". Raise ValueError for fewer than two, duplicates, or different depths.
    """
    if len(schedules) < 2:
        raise ValueError(
            'custom compares schedules: give two or more, such as --schedules "LL/LL/LLSLLS/LS" "LL/LL/LLLSSS/LS"'
        )
    arms = []
    for text in schedules:
        schedule, _, bridges = text.strip().partition(" ")
        parsed = parse_schedule(schedule)
        bridges = str(parse_bridges(bridges, parsed))
        arms.append(Arm(name=f"{schedule} {bridges}".rstrip(), schedule=schedule, bridges=bridges))
    depths = [parse_schedule(arm.schedule).depths for arm in arms]
    for arm, depth in zip(arms, depths, strict=True):
        if depth != depths[0]:
            raise ValueError(
                f"schedule {arm.schedule!r} has {_depths(depth)} layers per stage but {arms[0].schedule!r} has "
                f"{_depths(depths[0])}: give schedules of equal depths"
            )
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"duplicate schedule {max(names, key=names.count)!r}: name each once")
    bridged = any(arm.bridges for arm in arms)
    return Study(
        name="custom",
        title="Schedules of your own",
        varies="the schedule, and bridges" if bridged else "the schedule",
        fixed="everything else",
        network="hierarchical" if len(depths[0]) > 1 else "isotropic",
        arms=tuple(arms),
        claims=tuple(_claim(f"{name} > {names[0]}", name, names[0]) for name in names[1:]),
        data="",
    )


def _depths(depths: tuple[int, ...]) -> str:
    return "/".join(map(str, depths))


STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        _table1(),
        _fig5(),
        _table2(),
        _table6(),
        _table9(),
        _table8(),
        _token_shift(),
        _decay_init(),
        _raster(),
        _bridge_source(),
    )
}


def get_study(name: str) -> Study:
    """Return the study called `name`. Raise ValueError, which lists the names, for an unknown one."""
    if name not in STUDIES:
        raise ValueError(f"study {name!r} is unknown; the studies are {', '.join(STUDIES)}, fig1a, custom and all")
    return STUDIES[name]
