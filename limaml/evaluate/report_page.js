// Draws every figure of the page, one after the other so that the page stays responsive, in the colours of the theme.
(() => {
  "use strict";
  const plots = [...document.querySelectorAll(".plot")];
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 560px)");

  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--quiet").trim();
    const ground = style.getPropertyValue("--ground").trim();
    return {
      "font.color": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "modebar.color": ink,
      "hoverlabel.bgcolor": ground,
      "hoverlabel.bordercolor": ink,
      "hoverlabel.font.color": style.getPropertyValue("--ink").trim(),
    };
  };

  const draw = async (plot) => {
    const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    const config = { responsive: true, displaylogo: false, displayModeBar: !narrow.matches,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], scrollZoom: false };
    // a drag on a phone scrolls the page
    if (narrow.matches) figure.layout.dragmode = false;
    await Plotly.newPlot(plot, figure.data, figure.layout, config);
    await Plotly.relayout(plot, theme());
  };

  const drawAll = async () => {
    let drawn = 0;
    for (const plot of plots) {
      try {
        await draw(plot);
        drawn += 1;
      } catch (error) {
        console.error(`The picture ${plot.dataset.figure} could not be drawn.`, error);
      }
      await new Promise((resume) => setTimeout(resume, 0));
    }
    document.documentElement.dataset.drawn = String(drawn);
  };

  dark.addEventListener("change", () => plots.forEach((plot) => plot.layout && Plotly.relayout(plot, theme())));
  drawAll();
})();
