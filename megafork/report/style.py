"""The report's style sheet: light or dark by the reader's setting, one column on a phone, no external fonts or pictures."""

COLOURS = ("blue", "orange", "green", "violet", "sky", "sand", "grey", "ink")
"""Classes for curves, bars and keys. Blue means all tokens, orange forks; distinguishable with any colour vision."""

_SHEET = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #fff; --ink: #1f1d1a; --quiet: #6a655d; --rule: #e6e2da; --grid: #eeebe4;
  --blue: #0b6fb0; --orange: #d1540a; --green: #00805f; --violet: #7a5aa6; --sky: #7dbde8; --sand: #d9a441; --grey: #a8a297;
  --h1: #e6f0f8; --h2: #cbe1f2; --h3: #a6cbe7; --h4: #7bb1d8; --h5: #549ac9;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161512; --card: #1e1c19; --ink: #ebe7df; --quiet: #a29b8f; --rule: #35322c; --grid: #2b2924;
    --blue: #58b1ec; --orange: #f28c40; --green: #3fc59a; --violet: #b79ae0; --sky: #2f6f9f; --sand: #c79a45; --grey: #6f6a61;
    --h1: #172836; --h2: #1b3850; --h3: #1f4a6b; --h4: #235d88; --h5: #2a70a4;
  }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px }
h1, h2, .figure b.big { font-family: "Iowan Old Style", "Palatino Linotype", Palatino, Charter, Georgia, serif; font-weight: 600 }
h1 { font-size: 2.5rem; line-height: 1.1; margin: .2em 0 .25em; letter-spacing: -.01em; overflow-wrap: anywhere }
h2 { font-size: 1.5rem; margin: 3rem 0 .2rem }
h3 { font-size: 1rem; margin: 0 0 .1rem; font-weight: 600 }
p { margin: 0 0 .7rem; max-width: 70ch }
a { color: var(--blue); text-underline-offset: 2px }
header { padding-top: 44px }
.eyebrow { color: var(--quiet); font-size: .85rem; letter-spacing: .04em; margin: 0 }
.eyebrow i { color: var(--orange); font-style: normal }
.lead { font-size: 1.08rem; color: var(--quiet) }
.quiet, .note { color: var(--quiet); font-size: .9rem }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; padding: 10px 0; border-top: 1px solid var(--rule); font-size: .9rem }
:focus-visible { outline: 2px solid var(--orange); outline-offset: 2px; border-radius: 2px }
.warn { border-left: 3px solid var(--orange); padding: 2px 0 2px 12px; max-width: 70ch }

.figures { display: grid; grid-template-columns: 1.5fr repeat(3, 1fr); margin: 1.6rem 0;
  border: 1px solid var(--rule); border-radius: 10px; background: var(--card); overflow: hidden }
.figure { padding: 14px 18px; box-shadow: -1px -1px 0 var(--rule) }
.figure span { display: block; color: var(--quiet); font-size: .82rem }
.figure b { display: block; font-size: 1.2rem; line-height: 1.35; font-variant-numeric: tabular-nums; font-weight: 600 }
.figure:first-child { grid-row: span 2; display: flex; flex-direction: column; justify-content: center }
.figure b.big { font-size: 2.3rem; line-height: 1.3; white-space: nowrap }
.figure b i { color: var(--quiet); font-style: normal; font-weight: 400; padding: 0 .1em }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 18px; margin: 1rem 0 }
figure { margin: 0; padding: 16px 16px 8px; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; min-width: 0;
  display: flex; flex-direction: column }
figure svg { margin-top: auto }
figcaption p { margin: 0 0 .4rem }
svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 11px; font-variant-numeric: tabular-nums }
svg text { fill: var(--quiet) }
svg .y { text-anchor: end; dominant-baseline: central }
svg .x { text-anchor: middle }
svg .name { dominant-baseline: central; font-weight: 600; fill: var(--ink) }
svg .grid { stroke: var(--grid) } svg .base { stroke: var(--grey) }
svg .tau { stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 4 3 }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
svg .at rect { fill: transparent } svg .at line { stroke: var(--quiet); stroke-width: .7 }
svg .at line, svg .at circle { opacity: 0; pointer-events: none } svg .at:hover line, svg .at:hover circle { opacity: 1 }
svg .bar:hover { opacity: .72 }
.key { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: .82rem; color: var(--quiet); padding: 0; margin: 0 0 .4rem;
  list-style: none }
.key i, .share i { display: inline-block; width: .75em; height: .75em; border-radius: 2px; margin-right: .4em }
.share { list-style: none; padding: 0; margin: .8rem 0; font-variant-numeric: tabular-nums }
.share li { display: grid; grid-template-columns: 1.2em 1fr auto; border-top: 1px solid var(--grid); padding: 5px 0;
  align-items: baseline }
.strip { display: flex; height: 26px; border-radius: 5px; overflow: hidden; gap: 1px } .strip i { min-width: 1px }

.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 18px; align-items: start }
.group { margin: 1.2rem 0; padding-top: .9rem; border-top: 1px solid var(--rule) }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12em; overflow: auto; border-left: 3px solid var(--rule);
  padding-left: 12px;
  max-width: none }
.response { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; min-width: 0 }
.facts { font-size: .85rem; color: var(--quiet) } .facts b { margin-right: .4em } b.right { color: var(--green) }
b.wrong { color: var(--orange) }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: .88rem/2 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  max-width: none; margin: 0 }
.tokens span { position: relative; padding: 2px 0; margin-right: 1px; border-radius: 2px; cursor: default }
.fork { border-bottom: 2px solid var(--orange); border-bottom-left-radius: 0 !important; border-bottom-right-radius: 0 !important }
.tokens .line::before { content: "↵"; color: var(--quiet) } .tokens .blank.fork:not(.line)::before { content: "␣"; color: var(--quiet) }
.tokens span:focus { z-index: 1 }
.tokens span:focus::after { content: attr(title); position: absolute; left: 0; top: 100%; z-index: 2; width: max-content; max-width: 60vw;
  white-space: pre-line; font: .78rem/1.45 system-ui, sans-serif; background: var(--ink); color: var(--paper); padding: 6px 9px;
  border-radius: 6px }
.scale { display: flex; flex-wrap: wrap; gap: 4px; align-items: center; font-size: .8rem; color: var(--quiet); max-width: none }
.scale span + span { padding: 1px 8px; border-radius: 3px; color: var(--ink) } .scale .h0 { border: 1px solid var(--rule) }
.h1 { background: var(--h1) } .h2 { background: var(--h2) } .h3 { background: var(--h3) } .h4 { background: var(--h4) }
.h5 { background: var(--h5) }

details { margin: 1rem 0 } summary { cursor: pointer; font-weight: 600 }
.wide { overflow-x: auto } header .wide { margin: 1.2rem 0 }
pre { font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: 14px 16px; overflow: auto; margin: .6rem 0 }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--grid) }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
thead th { color: var(--quiet); font-weight: 500; border-color: var(--rule) } tbody th { font-weight: 400 }
footer { padding: 40px 24px 60px; color: var(--quiet); font-size: .85rem }
@media (max-width: 900px) {
  .figures { grid-template-columns: 1fr 1fr } .figure:first-child { grid-row: auto; grid-column: span 2 }
  .tokens span:focus::after { position: fixed; left: 14px; right: 14px; top: auto; bottom: 14px; width: auto; max-width: none }
}
@media (max-width: 560px) {
  main, header, footer { padding-left: 14px; padding-right: 14px } header { padding-top: 26px }
  h1 { font-size: 1.9rem } .figure { padding: 10px 12px } .figure b { font-size: 1rem } .figure b.big { font-size: 2rem }
  figure, .response { padding: 12px 10px 6px } .tokens { font-size: .84rem } svg { font-size: 12.5px }
}
@media print { details, figure, .response { break-inside: avoid } }
"""

_RULES = """
svg polyline.NAME { stroke: var(--NAME) }
svg rect.NAME, svg circle.NAME, svg text.NAME { fill: var(--NAME) }
i.NAME { background: var(--NAME) }
"""

STYLE = _SHEET + "".join(_RULES.replace("NAME", colour) for colour in COLOURS)
