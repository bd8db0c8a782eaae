// Theme, keys, the rows of the table, and which plots are on the screen; everything else is answered by the server.
window.dashAgGridFunctions = {
  // Rows that the table shows, in its order.
  shownRows(api) {
    const rows = [];
    api.forEachNodeAfterFilterAndSort(node => rows.push(node.data));
    return rows;
  },
  // seed2 before seed10.
  naturally: (one, other) => String(one).localeCompare(String(other), undefined, {numeric: true}),
};

(() => {
  const shown = () => [...document.querySelectorAll(".place")]
    .filter(place => {
      const {top, bottom} = place.getBoundingClientRect();
      return top < innerHeight && bottom > 0;
    })
    .map(place => JSON.parse(place.id).place);
  let told = "";
  let turn = 0; // what is told differs each time, so that the server is asked
  const tell = now => {
    told = now.join();
    dash_clientside.set_props("seen", {data: {names: now, turn: ++turn}});
  };
  const watch = new IntersectionObserver(() => {
    const now = shown();
    if (now.join() !== told) tell(now);
  });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    page: {
      // The places of plots are others: tell which of them are on the screen, and watch them. Before the plots that came
      // with them are there, they have no height, and all places are on the screen.
      placed: () => {
        let frames = 0;
        const begin = () => {
          const places = [...document.querySelectorAll(".place")];
          const waits = places.some(place => place.firstElementChild && !place.querySelector(".js-plotly-plot"));
          if (waits && ++frames < 600) return requestAnimationFrame(begin);
          watch.disconnect();
          places.forEach(place => watch.observe(place));
          tell(shown());
        };
        requestAnimationFrame(begin);
        dash_clientside.set_props("moves", {data: {}});
        return dash_clientside.no_update;
      },
      // Where the reader has moved the axes of each plot to, by all moves since it shows what it shows (the first word
      // of its key). A plot that is fitted to its place has not been moved.
      moved: (events, before, [known]) => {
        const now = {...before};
        for (const {prop_id, value} of dash_clientside.callback_context.triggered) {
          const name = JSON.parse(prop_id.slice(0, prop_id.lastIndexOf("."))).plot;
          const of = (known?.[name] ?? "").split(" ")[0];
          const axes = now[name]?.of === of ? {...now[name].axes} : {};
          for (const [key, to] of Object.entries(value ?? {})) {
            const [, axis, what, end] = key.match(/^([xy]axis\d*)\.(range|autorange)(?:\[([01])\])?$/) ?? [];
            if (what === "autorange") delete axes[axis];
            else if (end) axes[axis] = Object.assign([...(axes[axis] ?? [null, null])], {[end]: to});
            else if (what) axes[axis] = to;
          }
          now[name] = {of, axes};
        }
        return now;
      },
    },
  });
})();

(() => {
  const root = document.documentElement;
  const prefersDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = localStorage.getItem("theme") || (prefersDark() ? "dark" : "light");

  function changeTheme() {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  }

  document.addEventListener("click", event => {
    if (event.target.closest("#theme")) changeTheme();
  });

  document.addEventListener("keydown", event => {
    const typing = event.target.closest("input:not([type=radio]):not([type=checkbox]), textarea, [role=listbox]");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "t") changeTheme();
    const tabs = document.querySelectorAll("#view input");
    if (Number(event.key) >= 1 && Number(event.key) <= tabs.length) tabs[Number(event.key) - 1].click();
  });
})();
