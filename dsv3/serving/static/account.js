// The account: change of password, export, log-out.

import { byId } from "./elements.js";
import { call, whoAmI } from "./server.js";

export async function setUpAccount(onDeleted) {
  const me = await whoAmI();
  const dialog = byId("account-dialog");
  byId("account").textContent = me.account;
  byId("password-form").hidden = !me.has_password;
  byId("password-form").elements.username.value = me.account;
  byId("open-account").addEventListener("click", () => dialog.showModal());
  byId("password-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const problem = byId("password-problem");
    try {
      await call("POST", "/api/password", { old: byId("old").value, new: byId("new-password").value });
      await whoAmI(); // a new session
      problem.textContent = "Changed. All other sessions have ended.";
      event.target.reset();
    } catch (error) {
      problem.textContent = error.message;
    }
  });
  byId("export").addEventListener("click", () => location.assign("/api/export"));
  byId("delete-all").addEventListener("click", async () => {
    if (!confirm("Delete all conversations of this account?")) return;
    await call("DELETE", "/api/conversations");
    dialog.close();
    onDeleted();
  });
  byId("log-out").addEventListener("click", async () => {
    await call("POST", "/logout");
    location.replace("/login");
  });
}
