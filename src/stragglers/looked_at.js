// Says what is seen of the page, in the title on a screen and on the console in print: part of a
// test.
const light = c => { const v = c.map(x => x / 255).map(x =>
    x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
const rgb = s => s.match(/[\d.]+/g).map(Number);
const behind = e => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
const look = () => {
    let contrast = 21;
    for (const e of document.querySelectorAll("h1,h2,p,li,strong,td,th,dt,dd,svg text")) {
        if (!e.getClientRects().length) continue;
        const style = getComputedStyle(e);
        const ink = light(rgb(e.closest("svg") ? style.fill : style.color));
        const paper = light(behind(e));
        const [a, b] = [Math.max(ink, paper), Math.min(ink, paper)];
        contrast = Math.min(contrast, (a + .05) / (b + .05));
    }
    const boxes = q => [...document.querySelectorAll(q)].map(e =>
        e.getBoundingClientRect());
    const root = document.documentElement;
    const seen = {
        overflow: root.scrollWidth - root.clientWidth,
        contrast,
        dark: light(behind(document.body)) < .2,
        bars: boxes("#decline svg [fill='#000002']").map(b => b.height),
        dots: boxes("#directly svg circle").map(b => b.top),
        charts: boxes("svg").map(b => b.width),
        label: Math.min(...boxes("svg text").map(b => b.height)),
        cards: getComputedStyle(document.querySelector("td")).display == "flex",
        text: document.body.innerText,
    };
    return "seen:" + btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
};
document.title = look();
matchMedia("print").addEventListener("change", e => { if (e.matches) console.log(look()); });
