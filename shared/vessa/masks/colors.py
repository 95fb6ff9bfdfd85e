"""The colors of every picture: classes in overlays, legends and charts, methods in charts."""

# Okabe and Ito's colors, distinguishable with color blindness. Class id 1 is the first.
CLASS_COLORS = (
    (0, 158, 115),
    (230, 159, 0),
    (86, 180, 233),
    (213, 94, 0),
    (204, 121, 167),
    (240, 228, 66),
    (0, 114, 178),
)
OPACITY = 0.4  # of a class color over an image
# Lines and bars on white: gray for the baseline, then the same colors without yellow and light blue.
CHART_COLORS = ("#7a8794", "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")

_DARKER = 0.65  # factor for each further round through the seven colors


def class_color(class_id: int) -> tuple[int, int, int]:
    """Return the RGB color of a class id >= 1, 0 to 255; ids above 7 repeat the colors, darker."""
    round_, place = divmod(class_id - 1, len(CLASS_COLORS))
    red, green, blue = (round(channel * _DARKER**round_) for channel in CLASS_COLORS[place])
    return red, green, blue


def class_hex(class_id: int) -> str:
    """Return the color of a class id as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*class_color(class_id))
