"""
Turns a picture of visualize_training.py into one self-contained HTML page with the same panels, which can be zoomed and
show values under the pointer.

    page(draw(runs))     # a str; needs the package plotly, whose JavaScript (5 MB) the page contains
"""

import html

from matplotlib.colors import to_hex, to_rgba

STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; color: #222; margin: 0 auto; padding: 1rem; max-width: 1500px; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: .5rem 0 0; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, NARROWrem), 1fr)); gap: 1rem; }
.wide { grid-column: 1 / -1; }
section { min-width: 0; }
th { text-align: left; color: #777; font-weight: normal; padding-right: 1rem;
     vertical-align: top; white-space: nowrap; }
td { overflow-wrap: anywhere; }
"""
CONFIG = dict(responsive=True, displaylogo=False, modeBarButtons=[['toImage', 'zoom2d', 'pan2d', 'resetScale2d']])
MARKERS = {'o': 'circle', 's': 'square', 'D': 'diamond', '^': 'triangle-up', 'v': 'triangle-down', 'P': 'cross'}
MARKERS |= {'*': 'star', 'x': 'x-thin', '|': 'line-ns'}
PATTERNS = {'': '', '///': '/', '...': '.'}


def page(figure) -> str:
    """
    Returns the page of a Figure that visualize_training.draw() made. Raises ImportError if plotly is not installed.
    """
    from plotly.offline import get_plotlyjs

    axes = {ax.get_label(): ax for ax in figure.axes}
    right = axes.pop('mfu', None)  # the second y axis of the throughput panel
    sections = []
    for name, ax in axes.items():
        if not ax.axison:
            body = facts_table(ax)
        else:
            body = panel(ax, right if name == 'tokens_per_sec' else None, name=name)
        wide = ax.get_subplotspec().colspan.stop - ax.get_subplotspec().colspan.start > 1
        title = html.escape(ax.get_title(loc='left'))
        sections.append(f'<section{" class=wide" * wide}><h2>{title}</h2>{body}</section>')
    narrow = sum(not section.startswith('<section class=wide') for section in sections)
    style = STYLE.replace(
        'NARROW', '34' if narrow % 3 == 1 else '24'
    )  # two columns if three would leave one panel alone
    title = encodable(html.escape(' '.join(figure.get_suptitle().split())))
    return (
        f'<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>'
        f'<meta name=viewport content="width=device-width, initial-scale=1"><title>{title}</title>'
        f'<style>{style}</style><script>{get_plotlyjs()}</script></head>\n'
        f'<body><h1>{title}</h1><main>\n{encodable(chr(10).join(sections))}\n</main></body></html>\n'
    )


def encodable(text):
    return text.encode('utf-8', 'backslashreplace').decode()


def facts_table(ax):
    """Returns the panel of facts as a table. Its texts are names and values in turn."""
    words = [text.get_text() for text in ax.texts]
    rows = zip(words[::2], words[1::2])
    return (
        '<table>'
        + ''.join(f'<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in rows)
        + '</table>'
    )


def panel(ax, right, name):
    """
    Returns the <div> and <script> of one panel: curves, or horizontal bars. right: the Axes of a second y axis, or
    None.
    """
    import plotly.graph_objects as go

    chart = go.Figure()
    chart.update_layout(
        template='plotly_white',
        margin=dict(l=10, r=10, t=30, b=10),
        font_size=13,
        legend=dict(orientation='h', y=-0.2, yanchor='top'),
        barmode='overlay',
        showlegend=ax.get_legend() is not None,
        hovermode='closest' if ax.patches else 'x unified',
    )
    chart.update_xaxes(title_text=ax.get_xlabel().replace('\n', '<br>'), range=list(ax.get_xlim()), automargin=True)
    chart.update_yaxes(title_text=ax.get_ylabel(), automargin=True)
    if ax.patches:
        add_bars(chart, go, ax)
        height = 150 + 34 * len(ax.get_figure().run_names)
    else:
        for line in ax.lines:
            chart.add_trace(scatter(go, ax, line))
        for trace in [trace for trace in chart.data if trace.name == 'validation'][:1]:
            trace.showlegend = True
        scale_y(chart.layout.yaxis, ax, name)
        height = 440 if ax.get_subplotspec().colspan.stop - ax.get_subplotspec().colspan.start > 1 else 320
    if right:
        for line in right.lines:
            chart.add_trace(scatter(go, right, line, yaxis='y2'))
        axis = dict(overlaying='y', side='right', showgrid=False, title_text=right.get_ylabel(), automargin=True)
        chart.update_layout(yaxis2=axis | dict(range=list(right.get_ylim())))
    for text in ax.texts if not ax.patches else ():  # 'not recorded'
        chart.add_annotation(
            text=html.escape(text.get_text()), xref='paper', yref='paper', x=0.5, y=0.5, showarrow=False
        )
    chart.update_layout(height=height)
    return chart.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)


def scale_y(axis, ax, name):
    if ax.get_yscale() == 'log':
        axis.type = 'log'
    else:
        axis.range = list(ax.get_ylim())
    axis.exponentformat = 'e' if name == 'lr' else 'SI'


def scatter(go, ax, line, yaxis='y'):
    """Returns the trace of a matplotlib Line2D."""
    label, marker, color = line.get_label(), line.get_marker(), to_rgba(line.get_color())
    x, y = list(line.get_xdata()), list(line.get_ydata())
    if line.get_transform() == ax.get_xaxis_transform():  # y is a fraction of the panel's height
        low, high = ax.get_ylim()
        y = [low + value * (high - low) for value in y]
    drawn = line.get_linestyle() != 'None'
    trace = go.Scatter(x=x, y=y, yaxis=yaxis, name=html.escape(label.strip(' _')), showlegend=not label.startswith('_'))
    trace.mode = '+'.join(['lines'] * drawn + ['markers'] * (marker in MARKERS))
    alpha = line.get_alpha() or 1
    if drawn:
        dashes = line._unscaled_dash_pattern[1]
        trace.line = dict(color=to_hex(color), width=line.get_linewidth())
        trace.line.dash = ','.join(f'{length * line.get_linewidth():g}px' for length in dashes) if dashes else 'solid'
    if marker in MARKERS:
        fill = to_hex(line.get_markerfacecolor()) if line.get_markerfacecolor() != 'none' else 'white'
        edge = dict(color=to_hex(color), width=2 if marker in 'x|' else 1)
        trace.marker = dict(symbol=MARKERS[marker], size=line.get_markersize(), color=fill, line=edge)
    trace.opacity = alpha
    if label == '_raw':
        trace.hoverinfo = 'skip'
    return trace


def add_bars(chart, go, ax):
    """Adds the horizontal bars of a panel, stacked or not, and the texts on and next to them."""
    for bar in ax.patches:
        color = to_hex(bar.get_edgecolor() if bar.get_hatch() else bar.get_facecolor())
        chart.add_bar(
            orientation='h',
            base=[bar.get_x()],
            x=[bar.get_width()],
            y=[bar.get_y() + bar.get_height() / 2],
            width=0.7,
            marker=dict(color=color, pattern=dict(shape=PATTERNS[bar.get_hatch() or ''], fillmode='replace')),
            hovertemplate='%{x:.4g}<extra></extra>',
        )
    for text in ax.texts:
        x, y = text.get_position()
        box = dict(bgcolor='white', borderpad=1) if text.get_ha() == 'center' else {}  # a letter on a bar
        chart.add_annotation(x=x, y=y, text=html.escape(text.get_text()), showarrow=False, xanchor=text.get_ha(), **box)
    names = [html.escape(name) for name in ax.get_figure().run_names]
    chart.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.5, -0.5], showgrid=False, zeroline=False
    )
