// Theme, keys, the rows of the table, and which plots are on the screen; everything else is answered by the server.
window.dashAgGridFunctions = {
  // Rows that the table shows, in its order.
  shownRows(api) {
    const rows = [];
    api.forEachNodeAfterFilterAndSort(node => rows.push(node.data));
    return rows;
  },
};

(() => {
  const near = 100; // pixels: a plot is drawn before it is scrolled to
  const shown = () => [...document.querySelectorAll(".place")]
    .filter(place => {
      const {top, bottom} = place.getBoundingClientRect();
      return top < innerHeight + near && bottom > -near;
    })
    .map(place => JSON.parse(place.id).place);
  const same = (before, now) => before.length === now.length && before.every((name, i) => name === now[i]);
  let last = [];
  const watch = new IntersectionObserver(() => {
    const now = shown();
    if (!same(last, now)) dash_clientside.set_props("seen", {data: (last = now)});
  }, {rootMargin: `${near}px`});

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    page: {
      // Names of the plots on the screen, once their places are there.
      onScreen: () => new Promise(resolve => requestAnimationFrame(() => {
        watch.disconnect();
        document.querySelectorAll(".place").forEach(place => watch.observe(place));
        resolve(last = shown());
      })),
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
