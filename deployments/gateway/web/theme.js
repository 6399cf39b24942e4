// Sets the colours before anything is drawn: not a module, so that it runs at once.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return JSON.parse(localStorage.getItem("personaplex.settings") ?? "{}").theme;
    } catch {
      return undefined;
    }
  };
  const apply = () => {
    const theme = chosen();
    document.documentElement.dataset.theme = theme === "dark" || theme === "light" ? theme : dark.matches ? "dark" : "light";
    document.dispatchEvent(new Event("theme"));
  };
  apply();
  dark.addEventListener("change", apply);
  document.addEventListener("themechosen", apply);
})();
