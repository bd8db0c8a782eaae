// Theme, keys and the rows of the table; everything else is answered by the server.
window.dashAgGridFunctions = {
  // Rows that the table shows, in its order.
  shownRows(api) {
    const rows = [];
    api.forEachNodeAfterFilterAndSort(node => rows.push(node.data));
    return rows;
  },
};

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
