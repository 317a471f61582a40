"""Style and script of the page of a prepared data set, for light and dark screens."""

STYLE = """
:root{color-scheme:light dark;--paper:light-dark(#f7f7f5,#16181b);--card:light-dark(#fff,#1f2226);
--ink:light-dark(#1f2328,#e3e5e8);--faint:light-dark(#6b7178,#969da6);--line:light-dark(#e4e4e0,#31363c);
--accent:light-dark(#2f5d8a,#8db8e2);--learn:light-dark(#d9f0dc,#1f4228);--learn-ink:light-dark(#0f4a1d,#bdf0c6);
--chip:light-dark(#e3ecf6,#24384d);--warn:light-dark(#b4540a,#f0a860);--held:light-dark(#efe6f8,#3a2b4d)}
:root[data-theme=light]{color-scheme:light}:root[data-theme=dark]{color-scheme:dark}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;background:var(--paper);color:var(--ink);
margin:0 auto;max-width:84rem;padding:2.5rem 1.5rem 4rem}
h1{font-size:1.75rem;font-weight:650;letter-spacing:-.01em;margin:0}
h2{font-size:1.02rem;font-weight:650;margin:0 0 .7rem}body>h2{margin:2.4rem 0 .2rem;font-size:1.2rem}
.sub{color:var(--faint);margin:.2rem 0 1.3rem}
#theme{float:right;font-size:1.1rem;line-height:1;background:var(--card);color:var(--faint);cursor:pointer;
border:1px solid var(--line);border-radius:50%;width:2.2rem;height:2.2rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.8rem;margin-bottom:.8rem}
.facts div,section,article{background:var(--card);border:1px solid var(--line);border-radius:10px}
.facts div{padding:.8rem 1rem}.facts b{display:block;font-size:1.55rem;font-weight:600;line-height:1.25}
.facts span{color:var(--faint);font-size:.88rem}
.sections{display:grid;grid-template-columns:repeat(auto-fit,minmax(21rem,1fr));gap:.8rem;align-items:start}
section{padding:1rem 1.1rem;overflow-x:auto}section.wide{grid-column:1/-1}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3rem .9rem .3rem 0;vertical-align:top}
th{color:var(--faint);font-weight:500;font-size:.88rem}.n{text-align:right;font-variant-numeric:tabular-nums}
.list tr+tr>*{border-top:1px solid var(--line)}.causes .n{width:4rem}.causes p{margin:0 0 .3rem;overflow-wrap:anywhere}
.causes td:nth-child(2){width:17rem}small{color:var(--faint)}.good{margin:0;color:var(--faint)}
.bars td:first-child,.bars td:last-child{width:3.5rem;text-align:right;font-variant-numeric:tabular-nums}
.bars i{display:block;height:.95rem;background:var(--accent);opacity:.8;border-radius:3px;margin-top:.25rem}
.cards{columns:23rem;column-gap:.9rem}
article{break-inside:avoid;margin:0 0 .9rem;padding:.9rem 1rem;display:inline-block;width:100%}
article header{display:flex;flex-wrap:wrap;gap:.3rem .6rem;justify-content:space-between;margin-bottom:.6rem;
font-size:.9rem;overflow-wrap:anywhere}
article footer,figcaption,.more{color:var(--faint);font-size:.84rem}article footer{margin-top:.6rem}
.badge{background:var(--chip);border-radius:99px;padding:.08rem .6rem;margin-left:.3rem;font-size:.78rem;
white-space:nowrap}
.badge.held{background:var(--held)}
figure{margin:0 0 .7rem}figure svg{display:block;max-width:100%;width:var(--w);max-height:22rem;
margin:0 auto;border-radius:4px}
figcaption{margin-top:.35rem}figcaption b{font-weight:600;color:var(--ink)}
path{fill:none;vector-effect:non-scaling-stroke}.below{stroke:#000;stroke-opacity:.55;stroke-width:4}
.above{stroke:#fff;stroke-width:1.6}
.text{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.token,.cut,summary{color:var(--faint)}.token{font-size:.8em}details{color:var(--faint)}summary{cursor:pointer}
mark{background:var(--learn);color:var(--learn-ink);border-radius:3px;padding:.05rem .1rem;box-decoration-break:clone;
-webkit-box-decoration-break:clone}mark .token{color:inherit;opacity:.55}
.chip{background:var(--chip);border-radius:4px;padding:.05rem .4rem}
.warning{color:var(--warn);margin:.5rem 0 0;font-size:.88rem}.mend{color:var(--faint);margin:.5rem 0 0;font-size:.84rem}
"""
SCRIPT = """
document.getElementById('theme').onclick=()=>{const root=document.documentElement;
const dark=root.dataset.theme?root.dataset.theme==='dark':matchMedia('(prefers-color-scheme:dark)').matches;
root.dataset.theme=dark?'light':'dark'};
"""
